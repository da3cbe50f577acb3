"""Slices: exactly the rows that one data-parallel rank reads between two steps, in that order, on the node's own disk.

Rows that training would gather from all over shared storage are gathered by a helper process (`preparing`) while the
steps before them train, FIM and all, and are then read in one stretch. `batches` reads a step from its slice if that
is there and good, else from shared storage: the same rows either way, and nobody ever waits. A slice is one HDF5 file:

    positions  int64 (n)               of the rows in their phase
    rows       int32 (n, L + 1)        inputs and the last label
    labels     int32 (n, L)            only where they may be other than the inputs one ahead
    mask       uint8 (n, L)            only where labels may not count
    digests    uint8 (steps, 16)       xxh3_128 of what all of these have of each step

Attributes say what it is a slice of, and a reader that wants another one does not take it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.data import scratch as disk
from crystal_hpc.data.catalog import digest_of
from crystal_hpc.data.fim import PhaseFim, load_fims
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.rows import Rows, RowSource, read_rows
from crystal_hpc.data.shard import lay_out
from crystal_hpc.data.sources import Sources, open_source
from crystal_hpc.errors import DiskError, StoreError
from crystal_hpc.files import PENDING, fsync_path, make_folder

Positions = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Share:
    """One data-parallel rank's share of a phase: which positions each of its steps reads."""

    batch_size: int
    micro_batch: int
    data_rank: int
    data_size: int

    def positions(self, step: int) -> Positions:
        """int64 (batch_size / data_size,), in order of reading; see `data.batches`."""
        share = np.arange(self.batch_size, dtype=np.int64).reshape(-1, self.data_size, self.micro_batch)
        return share[:, self.data_rank, :].reshape(-1) + step * self.batch_size


@dataclass(frozen=True)
class Cut:
    """What slices of one rank's share of a phase are cut from, and how."""

    run: str
    """Digest of everything that decides the phase's rows."""
    phase: str
    share: Share
    steps: int
    """Of the phase."""
    span: int
    """Steps in a slice; slice k is steps [k * span, (k + 1) * span), the last one shorter."""

    def bounds(self, number: int) -> tuple[int, int]:
        """First step of a slice, and the one after its last."""
        return number * self.span, min((number + 1) * self.span, self.steps)

    def path(self, scratch: Path, first: int, stop: int) -> Path:
        """The file of the slice of steps first..stop-1."""
        rank, size = self.share.data_rank, self.share.data_size
        return self.folder(scratch) / f"{self.phase}.rank-{rank}-of-{size}.steps-{first}-{stop}.h5"

    def folder(self, scratch: Path) -> Path:
        """Where all slices of the phase lie on this node."""
        return disk.slices_folder(scratch) / self.run

    def attributes(self, first: int, stop: int) -> dict[str, int | str]:
        """What a slice says of itself."""
        return {"run": self.run, "phase": self.phase, "first_step": first, "stop_step": stop, **vars(self.share)}


@dataclass(frozen=True)
class Reading:
    """What it takes to read rows of a phase."""

    order: PhaseOrder
    sources: list[RowSource]
    fim: PhaseFim | None = None

    def rows(self, positions: Positions) -> Rows:
        """The rows at positions (n,)."""
        return read_rows(self.order, self.sources, positions, self.fim)

    @property
    def plain(self) -> bool:
        """Whether labels are always the inputs one ahead, and all of them count."""
        return self.fim is None and all(source.info.layout == "tokens" for source in self.sources)


def make_cut(run: Run, sources: Sources, phase: int, data_rank: int, data_size: int, span: int) -> Cut:
    """How slices of a phase (by its place in the run) are cut for one data-parallel rank."""
    named = run.phases[phase]
    order = run_orders(run, {name: info.tokens for name, info in sources.training.items()})[phase]
    decides = [repr(order), str(run.seed), sources.tokenizer, named.model_dump_json(include={"fim"})]
    decides += [f"{name} {sources.training[name].digest}" for name in order.sources]
    share = Share(named.batch_size, run.parallel.micro_batch, data_rank, data_size)
    return Cut(digest_of(decides), named.name, share, derive.phase_steps(named), span)


def open_reading(run: Run, sources: Sources, phase: int) -> Reading:
    """Opens the stores of a phase on shared storage."""
    order = run_orders(run, {name: info.tokens for name, info in sources.training.items()})[phase]
    opened: list[RowSource] = [open_source(sources.training[name], run.model.vocab_size) for name in order.sources]
    return Reading(order, opened, load_fims(run)[phase])


def write_slice(
    cut: Cut, scratch: Path, first: int, stop: int, reading: Reading, go_on: Callable[[int], bool] = lambda _: True
) -> Path | None:
    """Writes the slice of steps first..stop-1 under the commit rule; `go_on` is asked before each step.

    Returns None if told not to go on. Raises DiskError, and StoreError where shared storage is damaged.
    """
    path = cut.path(scratch, first, stop)
    pending = path.with_name(f"{path.name}.{os.getpid()}{PENDING}")
    share, length = cut.share, reading.order.sequence_length
    count = (stop - first) * len(share.positions(0))
    shapes = {"positions": ((count,), "<i8"), "rows": ((count, length + 1), "<i4")}
    if not reading.plain:
        shapes |= {"labels": ((count, length), "<i4"), "mask": ((count, length), "u1")}
    shapes["digests"] = ((stop - first, 16), "u1")
    arrays = {name: np.broadcast_to(np.zeros((), kind), shape) for name, (shape, kind) in shapes.items()}
    with disk.scratch_errors(path):
        make_folder(path.parent)
        _refuse_too_small(scratch, sum(array.nbytes for array in arrays.values()))
        try:
            places = lay_out(pending, arrays, cut.attributes(first, stop))
            with open(pending, "r+b", buffering=0) as file:
                for step in range(first, stop):
                    if not go_on(step):
                        return None
                    _write_step(file.fileno(), places, step - first, share.positions(step), reading)
                os.fsync(file.fileno())
            os.replace(pending, path)
            fsync_path(path.parent)
        finally:
            pending.unlink(missing_ok=True)
    return path


def _refuse_too_small(scratch: Path, needed: int) -> None:
    free = disk.free_bytes(scratch)
    if free < needed:
        raise DiskError(f"{scratch}: a slice needs {needed:,} bytes, {free:,} are free; make staging.span smaller")


def _write_step(descriptor: int, places: dict[str, int], number: int, positions: Positions, reading: Reading) -> None:
    rows = reading.rows(positions)
    arrays: Arrays = {"positions": positions, "rows": np.concatenate([rows.inputs, rows.labels[:, -1:]], axis=1)}
    if "labels" in places:
        mask = np.ones(rows.inputs.shape, np.uint8) if rows.mask is None else rows.mask.astype(np.uint8)
        arrays |= {"labels": rows.labels, "mask": mask}
    arrays["digests"] = np.frombuffer(_digest(arrays), np.uint8)
    for name, array in arrays.items():
        data, done = memoryview(array.tobytes()), 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], places[name] + number * len(data) + done)


def _digest(arrays: Arrays) -> bytes:
    digest = xxhash.xxh3_128()
    for name in ("positions", "rows", "labels", "mask"):
        if name in arrays:
            digest.update(arrays[name].tobytes())
    return digest.digest()


class SliceFile:
    """An open slice. Read by plain calls: a broken disk is then an error to go on from, not a signal that kills."""

    def __init__(self, cut: Cut, scratch: Path, first: int, stop: int) -> None:
        """Raises StoreError for a slice that is damaged or not the one asked for, FileNotFoundError for none."""
        self.path, self._first = cut.path(scratch, first, stop), first
        self._share = cut.share
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                found = {name: value for name, value in file.attrs.items()}
                self._about = {
                    name: (data.id.get_offset() or 0, data.dtype, data.shape[1:]) for name, data in file.items()
                }
        except Exception as error:  # h5py has as many as a damaged file has ways
            self.close()
            raise StoreError(f"{self.path}: the slice cannot be read ({error})") from error
        if found != cut.attributes(first, stop):
            self.close()
            raise StoreError(f"{self.path}: not the slice of this run, phase, rank and steps, but of {found}")

    def read(self, step: int) -> Rows:
        """The rows of a step. Raises StoreError for damaged ones."""
        positions, number = self._share.positions(step), step - self._first
        arrays = {name: self._part(name, number, len(positions)) for name in self._about if name != "digests"}
        if _digest(arrays) != self._part("digests", number, 1).tobytes():
            raise StoreError(f"{self.path}: step {step} is damaged")
        if not np.array_equal(arrays["positions"], positions):
            raise StoreError(f"{self.path}: step {step} holds other positions than the order says")
        inputs = np.ascontiguousarray(arrays["rows"][:, :-1])
        labels = arrays.get("labels", np.ascontiguousarray(arrays["rows"][:, 1:]))
        mask = arrays["mask"].astype(bool) if "mask" in arrays else None
        return Rows(inputs, labels, None if mask is None or mask.all() else mask)

    def _part(self, name: str, number: int, count: int) -> npt.NDArray[Any]:
        at, kind, shape = self._about[name]
        array = np.empty((count, *shape), kind)
        into, done = array.reshape(-1).view(np.uint8).data, 0
        while done < array.nbytes:
            found = os.preadv(self._descriptor, [into[done:]], at + number * array.nbytes + done)
            if found == 0:
                raise StoreError(f"{self.path}: cut short")
            done += found
        return array

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def hold(cut: Cut, scratch: Path) -> disk.Lock:
    """Takes part in the use of the run's folder of slices. Raises DiskError."""
    folder = cut.folder(scratch)
    with disk.scratch_errors(folder):
        make_folder(folder)
        held = disk.lock(folder, exclusive=False)
    if held is None:
        raise DiskError(f"{folder}: another process is removing it")
    return held


def remove_unfinished(cut: Cut, scratch: Path) -> None:
    """Deletes what a helper of this rank that was killed had begun. Raises OSError."""
    rank, size = cut.share.data_rank, cut.share.data_size
    for path in cut.folder(scratch).glob(f"{cut.phase}.rank-{rank}-of-{size}.*{PENDING}"):
        path.unlink(missing_ok=True)


def passed(cut: Cut, scratch: Path, before: int) -> Iterator[Path]:
    """This rank's slices of this phase that end at or before a step."""
    rank, size = cut.share.data_rank, cut.share.data_size
    for path in cut.folder(scratch).glob(f"{cut.phase}.rank-{rank}-of-{size}.steps-*.h5"):
        stop = path.stem.rpartition("-")[2]
        if stop.isdecimal() and int(stop) <= before:
            yield path
