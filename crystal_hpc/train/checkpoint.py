"""Saving a run's state so that it counts only when all of it is on disk. `restore` is the way back.

Every rank writes its own boxes of the state into a file of its own (`sharding`, `writing`, `distcp`) in
`checkpoints/<phase>/step_00001500.pending`, and takes digests of what it hands to the disk. When all have, rank 0 adds
the index and, last, `manifest.json`; one rename then makes the folder a generation. A kill at any instant leaves
either nothing that counts or all of it.

Periodic saves are asynchronous: training goes on while the ranks write, and then while rank 0 completes the generation.
At most one is under way. The ranks vote at every step boundary whether their part is done, so that nobody waits.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config.schema import Run
from crystal_hpc.config.units import format_bytes
from crystal_hpc.data.order import PhaseOrder
from crystal_hpc.errors import CheckpointError, CrystalError, DiskError
from crystal_hpc.log import log
from crystal_hpc.train import distcp, optim, record, retention, sharding
from crystal_hpc.train.generations import generation_folder, keep
from crystal_hpc.train.manifest import MANIFEST, Manifest, Why
from crystal_hpc.train.preemption import start_thread
from crystal_hpc.train.state import Position
from crystal_hpc.train.step import Trainer, gather_weights
from crystal_hpc.train.writing import CopyBuffer, RankResult, RankWriter

SAVES = "saves.jsonl"
"""In the run folder: a line for each checkpoint, at the step boundary after it has become durable, kept or not."""
TRIGGER = "save"
"""A file of this name in the run folder asks for a save; what is in it, if anything, names the checkpoint for good."""
MOST_FAILURES = 3
MARGIN = 1 << 18  # bytes, for the index and the manifest


@dataclass
class _UnderWay:
    """A save that has begun."""

    position: Position
    why: Why
    name: str
    pending: Path
    writer: RankWriter
    steps: int
    """That Adam has taken; it goes on counting while this is written."""
    total: int
    """Bytes over all ranks."""
    began: float
    written: bool = False
    """Whether all ranks' files are; what is left is rank 0's."""
    completed: "Future[BaseException | None]" = field(default_factory=Future)
    """Rank 0's: done when the generation counts, or with what went wrong."""


class Saver:
    """The saves of one attempt. Collective calls are `begin`, `advance`, `finish` and `save`."""

    def __init__(
        self, trainer: Trainer, run_folder: Path, orders: Sequence[PhaseOrder], last: Manifest | None = None
    ) -> None:
        """`last`: of the generation that the attempt began with. Raises CheckpointError for what cannot be saved."""
        if trainer.run.fp8 and trainer.run.fp8.recipe == "delayed":
            raise CheckpointError(
                "fp8.recipe: delayed scales by what it saw in earlier steps, which checkpoints do not carry yet, so a "
                "preempted run could not go on as if nothing had been; choose tensorwise or blockwise"
            )
        self._trainer, self._folder, self._orders = trainer, run_folder, orders
        self._run, self._comm = trainer.run, trainer.layout.comm
        self._last = last
        self._buffer = CopyBuffer()
        self._under_way: _UnderWay | None = None
        self._began = time.monotonic()
        self._stood_still = 0.0
        self._since: float | None = None
        self._failures = 0
        self._pruning: threading.Thread | None = None
        if last and self._comm.rank == 0:
            self._prune()  # the one that the attempt began with is verified now; saves in a hurry leave others behind

    @property
    def under_way(self) -> Position | None:
        """Of which position a save is being written."""
        return self._under_way.position if self._under_way else None

    def before_update(self) -> None:
        """Returns once the optimizer may change the state."""
        if self._under_way:
            with self._standing_still():
                self._under_way.writer.wait_until_copied()

    def vote(self) -> int:
        """1 if this rank has done what is next of the save under way; when all have, it is time to `advance`."""
        save = self._under_way
        if save is None:
            return 0
        if not save.written:
            return int(save.writer.finished)
        return int(self._comm.rank != 0 or save.completed.done())

    def is_asked_for(self) -> bool:
        """Whether rank 0 finds the trigger file, or it is time by the clock. Costs one look at the file system."""
        if self._comm.rank != 0 or (self._under_way and self._under_way.why == "asked for"):
            return False
        every = self._run.checkpoints.every
        due = every is not None and time.monotonic() - self._began >= every
        return due or (self._folder / TRIGGER).is_file()

    def begin(self, position: Position, why: Why = "periodic") -> Position | None:
        """Starts a save and returns; with `asynchronous: false`, saves. At most one is under way: waits for that one.

        Returns the position that is durable now and was not before, if any. A periodic save that fails costs a
        warning, and the third in a row is an error.
        """
        with self._standing_still():
            return self._begin(position, why)

    def _begin(self, position: Position, why: Why) -> Position | None:
        durable = self.finish()
        name = self._asked_name()
        if name is not None:
            why = "asked for"
        try:
            self._start(position, why, name or "", self._buffer if self._run.checkpoints.asynchronous else None)
        except DiskError as error:
            self._failed(error, why)
            return durable
        if self._under_way and not self._run.checkpoints.asynchronous:
            durable = self.finish()
        return durable

    def save(self, position: Position, why: Why) -> None:
        """Saves, and returns when the state is durable on every rank; keeps what is there already.

        What is under way is finished first if it is this very state or nearly done, and given up otherwise.
        Raises DiskError where the file system refuses, CheckpointError for stale weights.
        """
        with self._standing_still():
            self._settle(position)
            self._start(position, why, "", None)
            while self._under_way:
                self._advance(self._under_way)

    def advance(self) -> Position | None:
        """Waits for what is next of the save under way; returns its position when it has become durable."""
        save = self._under_way
        if save is None:
            return None
        try:
            with self._standing_still():
                self._advance(save)
        except (DiskError, OSError) as error:  # refused, or a storage that is sick
            self._failed(error, save.why)
            return None
        return None if self._under_way else save.position

    def finish(self) -> Position | None:
        """Waits for the save under way; returns its position if it has become durable."""
        durable = None
        while self._under_way:
            durable = self.advance()
        return durable

    def close(self) -> None:
        """Waits for deletions."""
        if self._pruning:
            self._pruning.join()

    @contextlib.contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Counts the time in the block as time in which training waits for a save."""
        outermost = self._since is None
        if outermost:
            self._since = time.perf_counter()
        try:
            yield
        finally:
            if outermost:
                self._stood_still += time.perf_counter() - (self._since or 0.0)
                self._since = None

    def _note(self, manifest: Manifest) -> None:
        """Adds the save to the run's history; how long training has stood still for it counts up to here."""
        now = time.perf_counter()
        stood_still = self._stood_still + now - (self._since or now)
        self._stood_still, self._since = 0.0, now
        about = {name: getattr(manifest, name) for name in ("phase", "step", "tokens", "why", "bytes", "seconds")}
        with contextlib.suppress(DiskError, OSError):  # the save itself is what counts
            files.append_line(self._folder / SAVES, {**about, "stood_still": stood_still, "time": time.time()})

    def _failed(self, error: DiskError | OSError, why: Why) -> None:
        self._failures += 1
        if why == "asked for":
            self._take_trigger()  # or every step would try again
        if self._failures == MOST_FAILURES:
            raise error
        log.warning("a checkpoint could not be written, training goes on without it: %s", error)

    def _settle(self, position: Position) -> None:
        """Finishes or gives up what is under way, whichever makes a state durable sooner."""
        if self._under_way is None:
            return
        written, total = self._comm.sum([self._under_way.writer.written, 0])[0], self._under_way.total
        if self._under_way.position == position or written * 2 > total:
            with contextlib.suppress(DiskError, OSError):  # the save that follows will say so, if it fails as well
                self.finish()
            return
        log.info(
            "giving up the save of step %d: %d%% of it is written",
            self._under_way.position.step,
            100 * written // total,
        )
        self._under_way.writer.abandon()
        self._drop()

    def _drop(self) -> None:
        """Forgets the save under way, and what it has written."""
        assert self._under_way
        pending, self._under_way = self._under_way.pending, None
        self._comm.barrier()  # nobody writes any more
        if self._comm.rank == 0:
            files.remove_folder(pending)  # a full disk has no room for it, and the journal needs some

    def _start(self, position: Position, why: Why, name: str, buffer: CopyBuffer | None) -> None:
        """Begins a save, unless that position is saved already."""
        self._began = time.monotonic()
        final = generation_folder(self._folder, self._run, position)
        if self._comm.broadcast((final / MANIFEST).exists()):
            return
        pending = final.with_name(final.name + files.PENDING)
        gather_weights(self._trainer)
        model = sharding.module(self._trainer)
        held = sharding.model_parts(model) + sharding.optimizer_parts(self._trainer)
        path = pending / f"__{self._comm.rank}_0.distcp"
        writer = RankWriter(path, [part for part in held if part.ours], sharding.objects(model), buffer)
        total = self._comm.sum([writer.total])[0]
        refusal = self._comm.broadcast(self._make_room(pending, total) if self._comm.rank == 0 else None)
        if refusal:
            raise DiskError(refusal)
        files.wait_until_visible(pending)
        steps = optim.steps(self._trainer.optimizer)
        self._under_way = _UnderWay(position, why, name, pending, writer, steps, total, time.time())
        if buffer is not None:
            writer.start()

    def _make_room(self, pending: Path, total: int) -> str | None:
        """Makes the folder; returns why not, if that or the bytes to come do not fit on the disk."""
        try:
            files.remove_folder(pending)
            files.make_folder(pending)
        except DiskError as error:
            return str(error)
        free = shutil.disk_usage(pending).free
        if free < total + MARGIN:
            self.close()  # what goes to make room may just not be gone yet
            free = shutil.disk_usage(pending).free
        if free >= total + MARGIN:
            return None
        files.remove_folder(pending)
        said = f"the disk is too full: a checkpoint needs {format_bytes(total)}, and {format_bytes(free)} are free"
        return f"{self._folder}: {said}; free some, or keep fewer (checkpoints.keep_last, crystal checkpoints)"

    def _advance(self, save: _UnderWay) -> None:
        """All ranks' files, then rank 0's: waits for them. Raises on every rank what went wrong on any."""
        if not save.written:
            results = self._comm.gather(_sendable(save.writer.result()))
            errors = [result for result in results if isinstance(result, BaseException)]
            save.written = not errors
            if save.written and self._comm.rank == 0:
                start_thread("checkpoint-completer", self._complete, save, results)
        else:
            error = self._comm.broadcast(save.completed.result() if self._comm.rank == 0 else None)
            errors = [error] if error else []
            if not errors:
                self._under_way, self._failures = None, 0
                if self._comm.rank == 0 and self._last:
                    self._note(self._last)
        if errors:
            self._drop()
            raise errors[0]

    def _complete(self, save: _UnderWay, results: list[RankResult]) -> None:
        """What rank 0 adds to the files of all ranks, in a thread."""
        final = save.pending.with_name(save.pending.name.removesuffix(files.PENDING))
        try:
            with files.disk_errors(save.pending):
                distcp.write_index(save.pending, [place for result in results for place in result.file.placed])
                manifest = self._described(save, results)
                record.refuse_stale(self._run, self._last, manifest)
                manifest.write(save.pending)
                files.commit_folder(save.pending, final)
            self._last = manifest
            if save.why == "asked for":
                self._answer(save, final)
            if save.why not in ("preempted", "time limit"):  # those are in a hurry
                self._prune()
        except BaseException as error:  # all ranks wait to hear of it
            save.completed.set_result(_sendable(error))
        else:
            save.completed.set_result(None)

    def _described(self, save: _UnderWay, results: list[RankResult]) -> Manifest:
        return record.describe(
            results,
            save.pending,
            run=self._run,
            position=save.position,
            ledger=record.ledger(self._run, self._orders, save.position),
            why=save.why,
            ranks=self._comm.size,
            adam_steps=save.steps,
            began=save.began,
        )

    def _answer(self, save: _UnderWay, final: Path) -> None:
        """Names the generation as it was asked, and takes the trigger away. Whatever goes wrong: it is saved."""
        try:
            if save.name:
                keep(final, save.name)
        except (CrystalError, OSError) as error:
            log.warning("%s is not kept by name: %s", final, error)
        self._take_trigger()

    def _take_trigger(self) -> None:
        if self._comm.rank == 0:
            with contextlib.suppress(OSError):
                (self._folder / TRIGGER).unlink()

    def _prune(self) -> None:
        """Deletes what need not be kept, beside the training."""
        self.close()
        # A job that is told to leave need not wait, as the next start deletes what is left.
        self._pruning = start_thread("checkpoint-pruner", _prune, self._folder, self._run)

    def _asked_name(self) -> str | None:
        """What stands in the trigger file, if there is one: rank 0's answer."""
        path, said = self._folder / TRIGGER, None
        if self._comm.rank == 0 and path.is_file():
            try:
                said = path.read_text(errors="replace").strip()[:100]
            except OSError:
                said = ""
        answer: str | None = self._comm.broadcast(said)
        return answer


def _prune(folder: Path, run: Run) -> None:
    try:
        retention.prune(folder, run)
    except (CrystalError, OSError) as error:
        log.warning("old checkpoints could not be deleted: %s", error)


def _sendable(result: Any) -> Any:
    """An error in a form that another rank can unpickle."""
    if not isinstance(result, BaseException) or isinstance(result, CrystalError | OSError):
        return result
    return RuntimeError(f"{type(result).__name__}: {result}")
