"""A muP sweep as an array of a real Slurm: the elements share the points; the same command then draws."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stories import wait_for

from crystal_hpc.config.schema import Cluster
from crystal_hpc.jobs import submitted

ROOT = Path(__file__).parents[2]


def test_the_elements_of_an_array_share_a_sweep_and_the_same_command_then_draws_it(
    devcluster: object,
    profile: Callable[..., Cluster],
    tiny_config: dict[str, Any],
    write_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    profile()
    folder = tmp_path / "sweep"
    words = ["--cluster", tmp_path / "cluster.yaml", "--out", folder, "--widths", "16,32", "--rates", ""]
    words += ["--coordinate-steps", "1", "--workers", "2"]
    command = [sys.executable, str(ROOT / "tools/mup_sweep.py"), str(write_config(tiny_config)), *map(str, words)]

    def said() -> str:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "0 of 4 points are done" in said()
    assert "is at work on the others" in said()
    (job,) = submitted.read_jobs(folder)
    assert job["slices"] == 2
    wait_for(lambda: not submitted.queued(folder), "the sweep to leave the queue")
    drawn = said()
    assert "slope of the change over widths" in drawn
    assert (folder / "coordinates.svg").exists()
    logs = [path.read_text() for path in folder.glob("logs/*_log.out")]
    assert sum(log.count(" begins") for log in logs) == sum(log.count(" is done") for log in logs) == 4
