"""What every rank of a training job runs: from the first signal handler to the outcome in the journal.

It is started with its signals held back. In order: handlers first, then the imports that take seconds, then the ranks
find each other, then `train.loop`. Rank 0 keeps the journal. The ways out:

- finished: every rank returns, submitit records success;
- told that time is nearly up, or to leave: saved; the ranks leave. On Slurm the job's batch script decides how it goes
  on (`batch`); locally rank 0 lets submitit requeue the job, with `launch` counted up;
- an error, or a hang: the rank leaves a note of the cause, and fails.
"""

import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import submitit

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError, CrystalError
from crystal_hpc.jobs import journal, lock
from crystal_hpc.jobs.launch import read_launch
from crystal_hpc.jobs.local_disk import copy_before_training
from crystal_hpc.jobs.place import Place, my_place
from crystal_hpc.log import log, setup_logging
from crystal_hpc.train.preemption import Stop, StopFlag, watch
from crystal_hpc.train.watchdog import Watchdog

OUTCOME = {Stop.NO: "finished", Stop.TIME_LIMIT: "time_limit", Stop.PREEMPTED: "preempted"}


class Superseded(Exception):
    """A later attempt has begun: Slurm gave this one up for lost, and it must touch nothing more."""


@dataclass(frozen=True)
class TrainTask:
    """A training job, as submitit pickles it. Everything else it needs is in the run folder."""

    run_folder: Path
    until: str | None = None
    """The phase with which the job ends; None for the end of the run."""
    launch: int = 0
    """How often submitit has requeued it (local jobs)."""

    def __call__(self) -> str:
        """Runs on every rank; returns the outcome `finished`, or leaves by SystemExit."""
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler, which a local job calls when it has saved
        flag = watch()
        place = my_place(launch=self.launch)
        stop = _Attempt(self.run_folder, place, self.until).run(flag)
        if stop is Stop.TIME_LIMIT and place.executor == "local" and place.rank == 0 and callable(requeue):
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

    def __init__(self, folder: Path, place: Place, until: str | None) -> None:
        self.folder, self.place, self.until = folder, place, until
        self.entry: journal.Entry = {}
        self.startup: dict[str, float] = {}
        self._mark = psutil.Process().create_time()

    def run(self, flag: StopFlag) -> Stop:
        """Trains; whatever happens is recorded before this returns or raises."""
        launch = read_launch(self.folder, self.place.start)
        flag.deadline = launch.deadline
        stacks = self.folder / "logs" / f"{self.place.start}.rank{self.place.rank}.stacks"
        watchdog = Watchdog(stacks, launch.hang_limit, self._note_hang)
        try:
            self._open()
            return self._train(flag, watchdog)
        except BaseException as error:
            self._note(error)
            raise
        finally:
            watchdog.stop()

    def _open(self) -> None:
        if self.place.rank == 0:
            files.make_folder(self.folder / "attempts")
            self._lock = lock.take(self.folder, self.place)  # kept: it goes with the process
            self.entry = journal.open_attempt(self.folder, self.place, self.until)
        setup_logging(self.place.rank, self.place.job, self.entry.get("attempt", 0))

    def _train(self, flag: StopFlag, watchdog: Watchdog) -> Stop:
        if self.place.executor == "local" and self.place.rank == 0:
            copy_before_training(self.folder, self.until, lambda: flag.stop is not Stop.NO, watchdog.beat)
        # Here, not at the top: handlers and journal stand before the seconds that these imports take.
        from crystal_hpc.jobs import rendezvous, training
        from crystal_hpc.train import loop

        self._lap("import")
        session = training.start(self.folder, self.place)
        comm = session.layout.comm
        self.entry = comm.broadcast(self.entry)
        setup_logging(self.place.rank, self.place.job, self.entry["attempt"])
        told = comm.gather((psutil.Process().pid, self.place.node))
        pids = {str(rank): pid for rank, (pid, _) in enumerate(told)}
        self._update(pids=pids, nodes=[node for _, node in told if node])
        self._lap("setup")
        job = session.job(flag, self.entry["attempt"], partial(self._on_event, flag), watchdog.beat, self.until)
        self._update(backend=job.trainer.used.line())
        ended = loop.train(job)
        job.metrics.close()
        heard = min((heard for heard in comm.gather((flag.time, flag.signal)) if heard[0]), default=(None, None))
        self._close(ended.stop, heard, ended.position.named(session.run))
        session.stop()
        if self.place.rank == 0:
            rendezvous.leave(self.folder / "attempts", self.place)
        return ended.stop

    def _on_event(self, flag: StopFlag, event: str, named: dict[str, Any], redone: int) -> None:
        """Follows the loop. A file is written when an attempt starts, takes its first step, and saves."""
        if self.place.rank == 0 and journal.is_superseded(self.folder, self.entry):
            raise Superseded(f"attempt {self.entry['attempt'] + 1} has begun: this one, given up for lost, leaves")
        if event == "started":
            if self.place.rank == 0 and journal.cancel_marker(self.folder).exists():
                flag.set(signal.SIGTERM)  # cancelled before there was anybody to tell
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
            self.place.rank == 0
            and saved
            and start["step"] == 0
            and not any(self.folder.glob("checkpoints/*/*/manifest.json"))
        ):
            raise CheckpointError(
                f"{self.folder}: attempts before this one saved checkpoints (the last: {saved[-1]['phase']} "
                f"{saved[-1]['step']}), and none is there; bring them back, or begin a run under another name"
            )

    def _close(self, stop: Stop, heard: tuple[float | None, str | None], at: dict[str, Any]) -> None:
        """Closes the attempt; `heard` is when the first of the ranks got a signal, and which."""
        if self.place.rank != 0:
            return
        durable = time.time() - heard[0] if heard[0] and stop is not Stop.NO else None
        outcome = OUTCOME[stop]
        if stop is Stop.PREEMPTED and journal.cancel_marker(self.folder).exists():
            outcome = "cancelled"
        where = f"{at['step']} steps of phase {at['phase']} done"
        reason = {
            "finished": f"phase {self.until} is done" if self.until else "all phases are done",
            "time_limit": f"time was nearly up; saved with {where}",
            "preempted": f"told to leave; saved with {where}",
            "cancelled": f"cancelled by the user; saved with {where}",
        }[outcome]
        journal.close(self.folder, self.entry, outcome, reason, signal=heard[1], signal_to_durable=durable)

    def _note(self, error: BaseException) -> None:
        """Leaves word of the cause. Rank 0 waits a moment for others' notes: its own error may be their echo."""
        if isinstance(error, Superseded) or journal.is_superseded(self.folder, self.entry):
            log.error("%s", error)
            return
        mistake = isinstance(error, CrystalError)
        reason = str(error) if mistake else f"{type(error).__name__}: {error}"
        log.error("%s", reason, exc_info=None if mistake else error)
        taken = isinstance(error, lock.RunIsTaken)
        journal.note_error(self.folder, self.place, _outcome_of(error), reason.splitlines()[0], mistake, taken=taken)
        if self.place.rank == 0 and self.entry:
            time.sleep(0.5)
            first = journal.first_error(self.folder, self.place.job, self.place.launch)
            assert first is not None
            journal.close_by_note(self.folder, self.entry, first)

    def _note_hang(self, reason: str) -> None:
        log.error("%s", reason)
        journal.note_error(self.folder, self.place, "node_failure", reason, hang=True)

    def _update(self, **fields: Any) -> None:
        if self.place.rank == 0:
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
