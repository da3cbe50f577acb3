"""A run seen from outside: phases, jobs, attempts, logs; and what a user can tell it, cancel.

Works from the run folder, and from squeue and scontrol where there is a Slurm; sacct adds how jobs ended, if it
answers. Attempts whose processes are gone are closed on the way. Needs no torch.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.config.units import format_count, format_seconds
from crystal_hpc.errors import RunError, SlurmError
from crystal_hpc.jobs import journal, slurm, submitted
from crystal_hpc.log import log

SHOWN_ATTEMPTS = 12


def describe_status(folder: Path) -> str:
    """Phases, jobs and attempts of a run as text. Raises RunError where there is no run."""
    run = load_run(_run_file(folder))
    journal.settle(folder)
    attempts = journal.read_attempts(folder)
    last = files.last_line(folder / "metrics.jsonl")
    lines = [*_phases(run, last), *_jobs(folder), *_attempts(attempts), *_rate(run, attempts, last)]
    stop = submitted.stopped(folder)
    if stop:
        lines.append(f"  stopped: {stop['reason']}; then go on with: crystal resume {folder}")
    return "\n".join(lines)


def describe_runs(runs: Path) -> str:
    """One line for each run in a folder of runs. Raises RunError if there is none."""
    found = sorted(path.parent for path in runs.glob("*/run.yaml"))
    if not found:
        raise RunError(f"{runs}: no runs there; name a run's folder, or start one with: crystal submit")
    lines = []
    for folder in found:
        run, last = load_run(folder / "run.yaml"), files.last_line(folder / "metrics.jsonl")
        attempts = journal.read_attempts(folder)
        state = (attempts[-1]["outcome"] or "running") if attempts else "not begun"
        state = "stopped" if submitted.stopped(folder) else state
        share = (last["tokens"] if last else 0) / derive.total_tokens(run)
        lines.append(f"{str(folder):<40}{share:>7.1%}  {len(attempts):>4} attempts  {state}")
    return "\n".join(lines)


def _phases(run: Run, last: dict[str, Any] | None) -> Iterator[str]:
    tokens, total = last["tokens"] if last else 0, derive.total_tokens(run)
    yield f"{run.name}: {tokens / total:.1%} of {format_count(total)} tokens"
    names = [phase.name for phase in run.phases]
    reached = names.index(last["phase"]) if last else 0
    for index, phase in enumerate(run.phases):
        steps = derive.phase_steps(phase)
        done = steps if index < reached else (last["step"] + 1 if last and index == reached else 0)
        yield f"  {phase.name:<20}{done:>10,} / {steps:,} steps"


def _jobs(folder: Path) -> Iterator[str]:
    """The jobs of the newest chain that are in the queue, or how they ended if accounting says."""
    jobs = submitted.read_jobs(folder)
    if not jobs:
        return
    try:
        queue = submitted.queued(folder)
    except SlurmError as error:
        yield f"  jobs unknown: {error}"
        return
    ended = slurm.accounted([job["id"] for job in jobs])
    for job in jobs:
        mine = [queued for queued in queue if queued.array == job["id"]]
        title = f"  job {job['id']:<8}{job['kind']:<9}{job['phase'] or 'all phases':<16}"
        working = [queued for queued in mine if queued.state in slurm.AT_WORK]
        for one in working:
            yield f"{title}{one.job} {one.state.lower()} on {one.nodes or 'no node'} since {one.start}"
        waiting = [queued for queued in mine if queued.state in slurm.WAITING]
        if waiting:
            many = f"{len(waiting)} slices " if len(waiting) > 1 else ""
            yield f"{title}{many}{waiting[0].state.lower()} ({waiting[0].reason})"
        if not mine and (states := [state for name, state in ended.items() if name.partition("_")[0] == job["id"]]):
            yield f"{title}{', '.join(dict.fromkeys(states)).lower()}"


def _attempts(attempts: list[journal.Entry]) -> Iterator[str]:
    if len(attempts) > SHOWN_ATTEMPTS:
        yield f"  ... {len(attempts) - SHOWN_ATTEMPTS} attempts before these"
    for entry in attempts[-SHOWN_ATTEMPTS:]:
        length = format_seconds((entry["ended"] or time.time()) - entry["started"])
        outcome = entry["outcome"] or "running"
        yield f"  attempt {entry['attempt']:<4}{outcome:<14}{length:>12}  {entry['reason'] or ''}".rstrip()


def _rate(run: Run, attempts: list[journal.Entry], last: dict[str, Any] | None) -> Iterator[str]:
    """Loss, rate and time left, while an attempt runs that has taken a step."""
    if not (attempts and attempts[-1]["outcome"] is None and last and last["attempt"] == attempts[-1]["attempt"]):
        return
    phase = next(phase for phase in run.phases if phase.name == last["phase"])
    rate = derive.tokens_per_step(phase) / last["seconds"]
    left = (derive.total_tokens(run) - last["tokens"]) / rate
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
    speed = f"{rate:,.0f} tokens/s" + (f" (MFU {last['mfu']:.1%})" if "mfu" in last else "")
    yield f"  loss {last['loss']:.3f}, {speed}, about {format_seconds(left)} left without a break ({at})"


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
    """Takes what waits of a run out of the queue, and tells the ranks that run to save and leave.

    Returns what to tell the user. Nothing of the run goes on by itself until it is submitted again.
    """
    _run_file(folder)
    journal.settle(folder)
    running = [entry for entry in journal.read_attempts(folder) if entry["outcome"] is None]
    files.make_folder(folder / "attempts")
    files.write_file(journal.cancel_marker(folder), "")  # first: a job that begins just now sees it
    gone, told = _cancel_queued(folder) if (folder / "jobs.json").exists() else (0, [])
    for entry in running:
        if entry["executor"] == "slurm" and entry["job"] not in told:
            told += _tell(entry["job"])
        for pid in entry["pids"].values() if entry["executor"] == "local" else ():
            told.append(entry["job"])
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGTERM)
    said = [f"took {gone} {'jobs' if gone > 1 else 'job'} out of the queue"] if gone else []
    if told:
        said.append(f"told job {', '.join(dict.fromkeys(told))} to save and leave; see: crystal status {folder}")
    return "; ".join(said) or f"{folder}: no job is running"


def _cancel_queued(folder: Path) -> tuple[int, list[str]]:
    """How many jobs waited, and are gone; ids of those that ran, and have been told."""
    queue = submitted.queued(folder)
    waiting = {job.array for job in queue if job.state in slurm.WAITING}
    slurm.cancel(waiting, waiting_only=True)
    told = []
    for job in queue:
        if job.state in slurm.AT_WORK:
            told += _tell(job.job)
    return len(waiting), told


def _tell(job: str) -> list[str]:
    """SIGTERM to the ranks alone: unlike a plain scancel, it gives them all the time they need to save."""
    try:
        slurm.tell(job, "TERM")
    except SlurmError as error:
        log.warning("%s", error)
        return []
    return [job]


def _run_file(folder: Path) -> Path:
    path = folder / "run.yaml"
    if not path.exists():
        raise RunError(f"{folder}: not a run folder (it has no run.yaml); runs are made by: crystal submit")
    return path
