"""How a job goes on once its ranks are gone: a pure function of the journal and of what Slurm says about the job.

The batch script acts on it (`batch`). Slurm itself requeues a preempted job only if it stays until the end of its grace
time; one that has saved and left early counts as completed. So every way of going on is decided here.
"""

import enum
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]
MOST_WITHOUT_PROGRESS = 3
MOST_FAILURES_OF_A_NODE = 2


class Next(enum.Enum):
    """What becomes of a job."""

    DONE = "done"
    """Its phase is trained: what is left of its slices goes."""
    AGAIN = "again"
    """Back to the queue, or on to the next slice."""
    LEAVE = "leave"
    """Slurm has already decided: cancelled, or requeued by somebody else."""
    STOP = "stop"
    """No use going on: the whole chain stops, with the reason."""


@dataclass(frozen=True)
class Verdict:
    """What to do, and the reason in words."""

    next: Next
    reason: str


def judge(attempts: list[Entry], phase_done: bool, job_state: str, cancelled: bool) -> Verdict:
    """What becomes of a job after the last of the attempts; `job_state` is Slurm's, of the job itself."""
    last = attempts[-1]
    if phase_done:
        return Verdict(Next.DONE, last["reason"])
    if job_state != "RUNNING":
        return Verdict(Next.LEAVE, f"Slurm says {job_state}")
    if cancelled:
        return Verdict(Next.LEAVE, "cancelled by the user")
    if last["outcome"] == "code_error" and last["mistake"]:
        return Verdict(Next.STOP, last["reason"])
    stuck = without_progress(attempts)
    if len(stuck) >= MOST_WITHOUT_PROGRESS:
        return Verdict(Next.STOP, f"{len(stuck)} attempts without progress, the last: {last['reason']}")
    return Verdict(Next.AGAIN, last["reason"])


def without_progress(attempts: list[Entry]) -> list[Entry]:
    """The failures since the last attempt that saved anything further than those before it.

    Being preempted or cancelled is no failure, however early; a time limit that comes before the first save is.
    """
    stuck: list[Entry] = []
    saved: Entry | None = None
    for entry in attempts:
        if entry["last_checkpoint"] is not None and entry["last_checkpoint"] != saved:
            saved, stuck = entry["last_checkpoint"], []
        elif entry["outcome"] == "finished":
            stuck = []
        elif entry["outcome"] not in (None, "preempted", "cancelled"):
            stuck.append(entry)
    return stuck


def nodes_to_exclude(attempts: list[Entry]) -> list[str]:
    """Nodes that took the blame for at least two attempts of the run."""
    blamed = [node for entry in attempts for node in set(entry.get("blamed", []))]
    return sorted({node for node in blamed if blamed.count(node) >= MOST_FAILURES_OF_A_NODE})
