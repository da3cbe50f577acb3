"""The jobs that a run has in Slurm's queue, as `jobs.json` in its folder remembers them; and why a run was stopped.

Written by `submit` as each job is queued; read by `batch` (what of a phase still waits), `status` and `cancel`.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import journal, slurm
from crystal_hpc.log import log

Job = dict[str, Any]


def read_jobs(folder: Path) -> list[Job]:
    """All jobs ever queued for a run, oldest first: kind, phase, id, slices, dependency, time."""
    path = folder / "jobs.json"
    return list(files.read_json(path)["jobs"]) if path.exists() else []


def add_job(folder: Path, job: Job) -> None:
    """Remembers a job that has just been queued."""
    files.write_json(folder / "jobs.json", {"jobs": [*read_jobs(folder), {**job, "submitted": time.time()}]})


def queued(folder: Path) -> list[slurm.QueuedJob]:
    """The run's jobs that wait or work. Raises SlurmError where Slurm does not answer."""
    return slurm.queue({job["id"] for job in read_jobs(folder)})


def ids(folder: Path, kind: str, phase: str | None) -> set[str]:
    """Ids of the jobs and arrays that were queued for one link of the chain."""
    return {job["id"] for job in read_jobs(folder) if (job["kind"], job["phase"]) == (kind, phase)}


def waiting_ids(folder: Path) -> set[str]:
    """Ids of all jobs of the run of which something waits."""
    return {job.array for job in queued(folder) if job.state in slurm.WAITING}


def stopped(folder: Path) -> dict[str, Any] | None:
    """Why and when the chain was stopped, with its last attempts; None if it was not."""
    path = folder / "stopped.json"
    return dict(files.read_json(path)) if path.exists() else None


def stop(folder: Path, reason: str, except_for: str) -> None:
    """Stops the chain: writes the report, and takes every job but one, which is ending, out of the queue."""
    log.error("the run stops: %s", reason)
    last = [
        {key: entry[key] for key in ("attempt", "job", "nodes", "outcome", "reason", "last_step", "last_checkpoint")}
        for entry in journal.read_attempts(folder)[-3:]
    ]
    files.write_json(folder / "stopped.json", {"reason": reason, "time": time.time(), "attempts": last})
    with contextlib.suppress(SlurmError):
        mine = except_for.partition("_")[0]
        slurm.cancel({job.array for job in queued(folder)} - {mine})
        slurm.cancel({mine}, waiting_only=True)


def clear(folder: Path) -> None:
    """Forgets that the run was stopped or cancelled: it is being submitted again."""
    (folder / "stopped.json").unlink(missing_ok=True)
    journal.cancel_marker(folder).unlink(missing_ok=True)
