"""The journal of a run: every start of a job recorded once, and closed with one authoritative outcome.

`attempts/0001.json` is opened by rank 0 when a job starts and closed by it when the job ends. A rank that fails leaves
a note (`<job>.<launch>.rank3.error.json`) first, so that the cause is not lost behind the errors it brings about
elsewhere. An attempt whose processes are gone without a word is closed by whoever looks next (`settle`): the batch
script of the job, the next attempt, or `crystal status`.
"""

import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

from crystal_hpc import files, provenance
from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import slurm
from crystal_hpc.jobs.place import Place
from crystal_hpc.log import log

OUTCOMES = (
    "finished",
    "preempted",
    "time_limit",
    "node_failure",
    "out_of_memory",
    "code_error",
    "cancelled",
)
TOGETHER = 4.0  # seconds in which ranks that wait for the same one give up; less than train.watchdog.MOMENT

Entry = dict[str, Any]


def read_attempts(run_folder: Path) -> list[Entry]:
    """All attempts, oldest first."""
    return [files.read_json(path) for path in sorted((run_folder / "attempts").glob("[0-9][0-9][0-9][0-9].json"))]


def open_attempt(run_folder: Path, place: Place, until: str | None) -> Entry:
    """Records that a job starts, to train `until` the end of a phase (None: of the run); only rank 0 calls this.

    Earlier attempts that never said goodbye are settled.
    """
    settle(run_folder, (place.job, place.launch))
    entry: Entry = {
        "attempt": len(read_attempts(run_folder)) + 1,
        "job": place.job,
        "launch": place.launch,
        "executor": place.executor,
        "until": until,
        "host": platform.node(),
        "nodes": [place.node] if place.node else [],
        "ranks": place.ranks,
        "pids": {"0": os.getpid()},
        "started": time.time(),
        "first_step": None,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "backend": None,
        "computing": None,
        "startup": {},
        "ended": None,
        "outcome": None,
        "reason": None,
        "last_step": None,
        "last_checkpoint": None,
        "signal": None,
        "signal_to_durable": None,
        "redone_steps": 0,
        "mistake": False,
        "blamed": [],
    }
    update(run_folder, entry)
    return entry


def update(run_folder: Path, entry: Entry, **fields: Any) -> None:
    """Adds to an attempt's record."""
    entry.update(fields)
    files.write_json(attempt_path(run_folder, entry["attempt"]), entry)


def close(run_folder: Path, entry: Entry, outcome: str, reason: str, **fields: Any) -> None:
    """Closes an attempt."""
    assert outcome in OUTCOMES, outcome
    update(run_folder, entry, ended=time.time(), outcome=outcome, reason=reason, **fields)


def note_error(
    run_folder: Path,
    place: Place,
    outcome: str,
    reason: str,
    mistake: bool = False,
    hang: bool = False,
    taken: bool = False,
) -> None:
    """Leaves word of what made this rank fail; a user's `mistake` would only fail again.

    `taken`: another job has the run (`lock`), so that nothing of this one belongs into its history.
    """
    path = run_folder / "attempts" / f"{place.start}.rank{place.rank}.error.json"
    said = {
        "rank": place.rank,
        "node": place.node,
        "outcome": outcome,
        "reason": reason,
        "mistake": mistake,
        "hang": hang,
        "taken": taken,
    }
    files.write_json(path, {"time": time.time(), **said})


def first_error(run_folder: Path, job: str, launch: int) -> Entry | None:
    """The note of the rank that failed first: the cause, as the others fail because of it."""
    return min(_notes(run_folder, job, launch), key=lambda note: note["time"], default=None)


def silent_nodes(run_folder: Path, entry: Entry) -> list[str]:
    """Nodes of the ranks that hang: they left no note with the others, or only when the end of the job woke them."""
    notes = _notes(run_folder, entry["job"], entry["launch"])
    first = min(note["time"] for note in notes)
    said = {note["rank"] for note in notes if note["time"] < first + TOGETHER}
    return sorted({node for rank, node in enumerate(entry["nodes"]) if rank not in said})


def close_by_note(run_folder: Path, entry: Entry, note: Entry) -> None:
    """Closes an attempt with what one of its ranks said."""
    close(run_folder, entry, note["outcome"], f"rank {note['rank']}: {note['reason']}", mistake=note["mistake"])


def settle(run_folder: Path, me: tuple[str, int] | None = None) -> None:
    """Closes attempts whose processes are gone: by the first error note, else as a node failure.

    `me` is the start of a job (id, launch) that asks; earlier starts of the same job are gone by Slurm's word.
    """
    for entry in read_attempts(run_folder):
        if entry["outcome"] is not None or is_alive(entry, me):
            continue
        note = first_error(run_folder, entry["job"], entry["launch"])
        if note:
            close_by_note(run_folder, entry, note)
        else:
            reason = "the job's processes vanished (killed, or the node was lost)"
            close(run_folder, entry, "node_failure", reason, blamed=_broken(entry))
        log.warning("attempt %d is over: %s, %s", entry["attempt"], entry["outcome"], entry["reason"])


def is_alive(entry: Entry, me: tuple[str, int] | None = None) -> bool:
    """Whether any process of an attempt still runs; an attempt that nobody here can know about counts as alive."""
    if entry["executor"] == "slurm":
        if me and me[0] == entry["job"]:
            return bool(me[1] == entry["launch"])
        try:
            return slurm.is_at_work(entry["job"], entry["launch"])
        except SlurmError:
            return True
    if entry["host"] != platform.node():
        return True
    return any(_is_ours(pid, entry["started"]) for pid in entry["pids"].values())


def is_superseded(run_folder: Path, entry: Entry) -> bool:
    """Whether a later attempt has begun, so that this one must touch nothing more.

    Slurm requeues a job whose node it cannot reach; the processes there may well live on.
    """
    return bool(entry) and attempt_path(run_folder, entry["attempt"] + 1).exists()


def cancel_marker(run_folder: Path) -> Path:
    """The file by which `crystal cancel` says that a run shall not go on; the next submission removes it."""
    return run_folder / "attempts" / ".cancelled"


def attempt_path(run_folder: Path, attempt: int) -> Path:
    """The file of one attempt."""
    return run_folder / "attempts" / f"{attempt:04d}.json"


def _notes(run_folder: Path, job: str, launch: int) -> list[Entry]:
    return [files.read_json(path) for path in (run_folder / "attempts").glob(f"{job}.{launch}.rank*.error.json")]


def _broken(entry: Entry) -> list[str]:
    try:
        return slurm.broken_nodes(",".join(sorted(set(entry["nodes"])))) if entry["executor"] == "slurm" else []
    except SlurmError:
        return []


def _is_ours(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        # A process that is younger than the attempt by more than its start-up merely has the same number.
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() < started + 60)
    except psutil.Error:
        return False
