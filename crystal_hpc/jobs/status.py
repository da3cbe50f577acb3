"""A run seen from its folder: phases, attempts, logs; and the one message a user can send to it, cancel.

Needs neither scheduler nor torch. Attempts whose processes are gone are closed on the way.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.units import format_count, format_seconds
from crystal_hpc.errors import RunError
from crystal_hpc.jobs import journal


def describe_status(folder: Path) -> str:
    """Phases and attempts of a run as text. Raises RunError where there is no run."""
    run = load_run(_run_file(folder))
    journal.settle(folder)
    last = files.last_line(folder / "metrics.jsonl")
    tokens = last["tokens"] if last else 0
    total = derive.total_tokens(run)
    lines = [f"{run.name}: {tokens / total:.1%} of {format_count(total)} tokens"]
    names = [phase.name for phase in run.phases]
    reached = names.index(last["phase"]) if last else 0
    for index, phase in enumerate(run.phases):
        steps = derive.phase_steps(phase)
        done = steps if index < reached else (last["step"] + 1 if last and index == reached else 0)
        lines.append(f"  {phase.name:<20}{done:>10,} / {steps:,} steps")
    attempts = journal.read_attempts(folder)
    for entry in attempts:
        length = format_seconds((entry["ended"] or time.time()) - entry["started"])
        outcome = entry["outcome"] or "running"
        lines.append(f"  attempt {entry['attempt']:<4}{outcome:<14}{length:>12}  {entry['reason'] or ''}".rstrip())
    if attempts and attempts[-1]["outcome"] is None and last and last["attempt"] == attempts[-1]["attempt"]:
        phase = run.phases[reached]
        left = (total - tokens) / derive.tokens_per_step(phase) * last["seconds"]
        rate = derive.tokens_per_step(phase) / last["seconds"]
        lines.append(f"  loss {last['loss']:.3f}, {rate:,.0f} tokens/s, about {format_seconds(left)} left")
    return "\n".join(lines)


def log_lines(folder: Path, rank: int, count: int, follow: bool) -> Iterator[str]:
    """The last lines of a rank's newest log, then, with `follow`, the lines that come. Raises RunError without one."""
    _run_file(folder)
    found = sorted((folder / "logs").glob(f"*_{rank}_log.out"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RunError(f"{folder}: no log of rank {rank} yet")
    with open(found[-1], errors="replace") as file:
        yield from file.readlines()[-count:]
        while follow:
            line = file.readline()
            if line:
                yield line
            else:
                time.sleep(0.5)


def cancel(folder: Path) -> str:
    """Sends SIGTERM to the ranks of a running job, which save and leave; returns what to tell the user."""
    _run_file(folder)
    journal.settle(folder)
    running = [entry for entry in journal.read_attempts(folder) if entry["outcome"] is None]
    if not running:
        return f"{folder}: no job is running"
    entry = running[-1]
    files.write_file(folder / "attempts" / f"{entry['attempt']:04d}.cancel", "")
    for pid in entry["pids"].values():
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGTERM)
    return f"told job {entry['job']} to save and leave; see: crystal status {folder}"


def _run_file(folder: Path) -> Path:
    path = folder / "run.yaml"
    if not path.exists():
        raise RunError(f"{folder}: not a run folder (it has no run.yaml); runs are made by: crystal submit")
    return path
