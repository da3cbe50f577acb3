"""What every rank of a job runs: from the first signal handler to the outcome in the journal.

submitit starts it on each rank, its signals held back. In order: handlers first, then the imports that take seconds,
then the ranks find each other, then `train.loop`. Rank 0 keeps the journal. The ways out:

- finished: every rank returns, submitit records success;
- SIGUSR2 (time nearly up): saved; rank 0 lets submitit requeue the job, with `launch` counted up;
- SIGTERM (preempted, cancelled): saved; the ranks leave, requeueing is the scheduler's business;
- an error: the rank leaves a note of the cause, and submitit records the failure.
"""

import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import submitit

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError, CrystalError
from crystal_hpc.jobs import journal
from crystal_hpc.log import log, setup_logging
from crystal_hpc.train.preemption import Stop, StopFlag, watch

OUTCOME = {Stop.NO: "finished", Stop.TIME_LIMIT: "time_limit", Stop.PREEMPTED: "preempted"}


@dataclass(frozen=True)
class TrainTask:
    """A training job, as submitit pickles it. Everything else it needs is in the run folder."""

    run_folder: Path
    launch: int = 0
    """How often submitit has requeued it: keeps the meeting points of its ranks apart."""

    def __call__(self) -> str:
        """Runs on every rank; returns the outcome `finished`, or leaves by SystemExit."""
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler, which this job calls when it has saved
        flag = watch()
        job = submitit.JobEnvironment()
        attempt = _Attempt(self.run_folder, job.global_rank, job.num_tasks, f"{job.job_id}.{self.launch}")
        stop = attempt.run(flag, job.local_rank)
        if stop is Stop.TIME_LIMIT and job.global_rank == 0 and callable(requeue):
            requeue(signal.SIGUSR2, None)
        if stop is not Stop.NO:
            # Not a return: submitit would record that as the job's success.
            sys.exit(0)
        return OUTCOME[stop]

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit runs next: the same job, one launch later. The state itself is already on disk."""
        return submitit.helpers.DelayedSubmission(replace(self, launch=self.launch + 1))


class _Attempt:
    """One rank's part of one start of the job."""

    def __init__(self, folder: Path, rank: int, ranks: int, job: str) -> None:
        self.folder, self.rank, self.ranks, self.job = folder, rank, ranks, job
        self.meeting = folder / "attempts" / f".meeting-{job}"
        self.entry: journal.Entry = {}
        self.startup: dict[str, float] = {}
        self._mark = psutil.Process().create_time()

    def run(self, flag: StopFlag, local_rank: int) -> Stop:
        """Trains; whatever happens is recorded before this returns or raises."""
        try:
            self._open()
            stop = self._train(flag, local_rank)
        except BaseException as error:
            self._note(error)
            raise
        return stop

    def _open(self) -> None:
        if self.rank == 0:
            files.make_folder(self.folder / "attempts")
            self.entry = journal.open_attempt(self.folder, self.job, "local", self.ranks)
        setup_logging(self.rank, self.job, self.entry.get("attempt", 0))

    def _train(self, flag: StopFlag, local_rank: int) -> Stop:
        # Here, not at the top: handlers and journal stand before the seconds that these imports take.
        from crystal_hpc.jobs import training
        from crystal_hpc.train import loop

        self._lap("import")
        session = training.start(self.folder, self.rank, self.ranks, local_rank, f"file://{self.meeting}")
        comm = session.layout.comm
        self.entry = comm.broadcast(self.entry)
        setup_logging(self.rank, self.job, self.entry["attempt"])
        pids = comm.gather(psutil.Process().pid)
        self._update(pids={str(rank): pid for rank, pid in enumerate(pids)}, backend=session.backend)
        self._lap("setup")
        job = session.job(flag, self.entry["attempt"], self._on_event)
        ended = loop.train(job)
        job.metrics.close()
        told = min((told for told in comm.gather((flag.time, flag.signal)) if told[0]), default=(None, None))
        self._close(ended.stop, told, ended.position.named(session.run))
        session.stop()
        return ended.stop

    def _on_event(self, event: str, named: dict[str, Any], redone: int) -> None:
        """Follows the loop. A file is written when an attempt starts, takes its first step, and saves."""
        if event == "started":
            self._refuse_lost_history(named)
            self._update(first_step=named, redone_steps=redone)
            self._lap("data")
        elif event == "step":
            self.entry["last_step"] = named
            if "first_step" not in self.startup:
                self._lap("first_step")
        elif event == "saved":
            self._update(last_checkpoint=named)

    def _refuse_lost_history(self, start: dict[str, Any]) -> None:
        """A run that has saved before must not quietly begin again."""
        saved = [entry["last_checkpoint"] for entry in journal.read_attempts(self.folder) if entry["last_checkpoint"]]
        if (
            self.rank == 0
            and saved
            and start["step"] == 0
            and not any(self.folder.glob("checkpoints/*/*/manifest.json"))
        ):
            raise CheckpointError(
                f"{self.folder}: attempts before this one saved checkpoints (the last: {saved[-1]['phase']} "
                f"{saved[-1]['step']}), and none is there; bring them back, or begin a run under another name"
            )

    def _close(self, stop: Stop, told: tuple[float | None, str | None], at: dict[str, Any]) -> None:
        """Closes the attempt; `told` is when the first of the ranks heard a signal, and which."""
        if self.rank != 0:
            return
        durable = time.time() - told[0] if told[0] and stop is not Stop.NO else None
        outcome = OUTCOME[stop]
        if stop is Stop.PREEMPTED and (self.folder / "attempts" / f"{self.entry['attempt']:04d}.cancel").exists():
            outcome = "cancelled"
        where = f"{at['step']} steps of phase {at['phase']} done"
        reason = {
            "finished": "all phases are done",
            "time_limit": f"time was nearly up; saved with {where}",
            "preempted": f"told to leave; saved with {where}",
            "cancelled": f"cancelled by the user; saved with {where}",
        }[outcome]
        journal.close(self.folder, self.entry, outcome, reason, signal=told[1], signal_to_durable=durable)
        self.meeting.unlink(missing_ok=True)

    def _note(self, error: BaseException) -> None:
        """Leaves word of the cause. Rank 0 waits a moment for others' notes: its own error may be their echo."""
        outcome = _outcome_of(error)
        reason = str(error) if isinstance(error, CrystalError) else f"{type(error).__name__}: {error}"
        log.error("%s", reason, exc_info=None if isinstance(error, CrystalError) else error)
        attempt = self.entry.get("attempt") or len(journal.read_attempts(self.folder))
        journal.note_error(self.folder, attempt, self.rank, outcome, reason.splitlines()[0])
        if self.rank == 0 and self.entry:
            time.sleep(0.5)
            first = journal.first_error(self.folder, attempt)
            assert first is not None
            journal.close(self.folder, self.entry, first["outcome"], f"rank {first['rank']}: {first['reason']}")

    def _update(self, **fields: Any) -> None:
        if self.rank == 0:
            journal.update(self.folder, self.entry, **fields)

    def _lap(self, name: str) -> None:
        """Notes the seconds since the last lap, or since the process began."""
        now = time.time()
        self.startup[name], self._mark = round(now - self._mark, 3), now
        self._update(startup=self.startup)


def _outcome_of(error: BaseException) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out_of_memory"
    # What gloo and NCCL say when a rank is killed, or its node is: the others have done nothing wrong.
    lost = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return "node_failure" if any(words in str(error) for words in lost) else "code_error"
