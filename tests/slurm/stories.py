"""A run on the private Slurm as tests tell of it, and patience."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Cluster
from crystal_hpc.jobs import journal, submit, submitted

PATIENCE = 240.0


class Story:
    """A run on the private Slurm, and what a test may want to know of it or do to it."""

    def __init__(self, config: Path, cluster: Cluster, runs: Path) -> None:
        self.cluster = cluster
        self.folder = submit.prepare(load_run(config), cluster, runs)

    def start(self) -> list[Any]:
        return submit.start(self.folder, self.cluster)

    def attempts(self) -> list[dict[str, Any]]:
        return journal.read_attempts(self.folder)

    def outcomes(self) -> list[str]:
        return [entry["outcome"] for entry in self.attempts()]

    def wait_for_step(self, phase: str, step: int) -> dict[str, Any]:
        """Waits until a step is done and all ranks are in the journal; returns the attempt."""

        def reached() -> Any:
            line, attempts = files.last_line(self.folder / "metrics.jsonl"), self.attempts()
            running = attempts and attempts[-1]["outcome"] is None and len(attempts[-1]["pids"]) == self.cluster.ranks
            return running and line and (line["phase"], line["step"] >= step) == (phase, True) and attempts[-1]

        entry: dict[str, Any] = wait_for(reached, f"step {step} of {phase}")
        return entry

    def wait_until_over(self) -> None:
        wait_for(lambda: not submitted.queued(self.folder), "the chain to leave the queue")

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.folder / "logs").glob("*_log.out")))


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first true value of a condition; fails the test after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    queue = subprocess.run(["squeue"], capture_output=True, text=True, check=False).stdout
    pytest.fail(f"waited {seconds:.0f} s in vain for {what}; the queue:\n{queue}")
