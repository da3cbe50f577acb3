"""One job at a time on a run folder: a lock that rank 0 holds as long as its process lives, and that a dead one cannot.

The kernel (or the file server) drops the lock with its holder. `submit` and the batch script look at the journal and at
Slurm first; this is for what they cannot see: two scripts started by hand in the same second, a local job beside one of
Slurm's. A process that lives on after Slurm has given its node up does not hinder the next attempt: Slurm's word
counts, and the lock is taken from it (it notices before it writes, `task.Superseded`).
"""

import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

from crystal_hpc import files
from crystal_hpc.errors import RunError, SlurmError
from crystal_hpc.jobs import slurm
from crystal_hpc.jobs.place import Place
from crystal_hpc.log import log

LOCK = ".lock"
PATIENCE = 30.0  # seconds; the job before may still be on its way out (CRYSTAL_LOCK_PATIENCE changes it)


class RunIsTaken(RunError):
    """Another job is at work on the run; nothing of the run has been touched."""


def take(run_folder: Path, place: Place, patience: float | None = None) -> IO[bytes]:
    """Takes the run for this job; the lock is held until the file that is returned is closed, or the process ends.

    Raises RunIsTaken if another job still has it after `patience` seconds.
    """
    path = run_folder / "attempts" / LOCK
    if patience is None:
        patience = float(os.environ.get("CRYSTAL_LOCK_PATIENCE", PATIENCE))
    deadline = time.monotonic() + patience
    while True:
        file = _lock(path)
        if file:
            _sign(file, place)
            return file
        holder = _holder(path)
        if holder and _is_given_up(holder, place):
            _take_away(path, holder)
        elif time.monotonic() > deadline:
            raise RunIsTaken(
                f"{run_folder}: {_described(holder)} is at work on this run; wait for it, or end it with: "
                f"crystal cancel {run_folder}"
            )
        else:
            time.sleep(0.2)


def _lock(path: Path) -> IO[bytes] | None:
    """The lock file, locked; None while another process has it."""
    with files.disk_errors(path):
        file = open(path, "a+b")  # noqa: SIM115 (it stays open as long as the lock is held)
    if not (_locked(file) and _is_still(path, file)):
        file.close()
        return None
    os.register_at_fork(after_in_child=file.close)  # a child that outlives us must not hold it
    return file


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in files.NO_LOCKS:
            raise
        log.warning("this file system has no locks: only the journal and Slurm keep two jobs from one run")
    return True


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Whether the file that we have locked is the one that others find: it may have been taken away meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sign(file: IO[bytes], place: Place) -> None:
    about = {"executor": place.executor, "job": place.job, "launch": place.launch}
    file.truncate(0)
    file.write(json.dumps({**about, "host": platform.node(), "pid": os.getpid(), "since": time.time()}).encode())
    file.flush()


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        holder = files.read_json(path)
    except (OSError, ValueError):
        return None  # gone, or not signed yet
    return holder if isinstance(holder, dict) and {"executor", "job", "launch"} <= holder.keys() else None


def _is_given_up(holder: dict[str, Any], place: Place) -> bool:
    """Whether Slurm says that the holder's start of its job is over, whatever still runs."""
    if holder["executor"] != "slurm":
        return False
    if place.executor == "slurm" and holder["job"] == place.job:
        return bool(holder["launch"] < place.launch)
    try:
        return not slurm.is_at_work(holder["job"], holder["launch"])
    except SlurmError:
        return False


def _take_away(path: Path, holder: dict[str, Any]) -> None:
    """Leaves a given-up holder with a file that nobody looks at any more; of several that want to, one does it."""
    with open(path.with_name(LOCK + ".change"), "ab") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if _holder(path) == holder:
            log.warning("%s has been given up by Slurm: taking the run from it", _described(holder))
            path.unlink()


def _described(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another job"
    return f"job {holder['job']} (process {holder.get('pid')} on {holder.get('host')})"
