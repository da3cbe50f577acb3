"""One rank's part of one save: a copy of the state, and a thread that writes it while training goes on.

A thread, not a process: nothing is handed over, no second copy of torch starts, and signals are for the main thread
alone, so a writer cannot die of one. Copying and writing leave Python's lock to the training.

The copy is lazy. Forward and backward passes do not change weights or moments, so the thread copies them while the
next step computes, and only the optimizer has to wait until it is done (`wait_until_copied`): training stalls for what
the copy takes longer than a forward and backward pass. The memory of the copy is kept for the next save.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.train.distcp import Chunk, FileWriter, Index, Written
from crystal_hpc.train.keys import MOMENTS, STATE, is_stack
from crystal_hpc.train.preemption import start_thread
from crystal_hpc.train.sharding import Part

_MOMENTS = tuple(f"{STATE}{name}." for name in MOMENTS)
NORM_BLOCK = 1 << 12  # numbers that are summed in float32 before sums go on in float64


class Abandoned(Exception):
    """The save was given up on purpose."""


@dataclass(frozen=True)
class RankResult:
    """What a rank has written, as it is told to rank 0."""

    file: Written
    squares: dict[tuple[str, int | None], float]
    """(key, layer of a stack of layers) -> sum of squares of this rank's share of the model's weights."""
    weights: dict[tuple[str, Index], str]
    """(key, offset) -> xxh3-64 of a box of the float32 weights, those that the optimizer updates."""


class CopyBuffer:
    """Host memory for copies of the state, page-locked where there is a GPU; kept from save to save."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def like(self, parts: list[Part]) -> list[Tensor]:
        """A tensor for each part, the same ones as last time if the parts are."""
        told = [(part.tensor.shape, part.tensor.dtype) for part in parts]
        if told != [(tensor.shape, tensor.dtype) for tensor in self._tensors]:
            pinned = any(part.tensor.is_cuda for part in parts)
            self._tensors = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape, dtype in told]
        return self._tensors


class RankWriter:
    """Writes the parts that are this rank's own into one file, in a thread or at once."""

    def __init__(
        self, path: Path, parts: list[Part], objects: dict[str, bytes], buffer: CopyBuffer | None = None
    ) -> None:
        """`buffer`: where the copy goes; without one, nothing is copied and the state must not change meanwhile."""
        self._path, self._parts, self._objects, self._buffer = path, parts, objects, buffer
        self._copied, self._abandoned = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._result: RankResult | None = None
        self.total = sum(part.tensor.nbytes for part in parts)
        """Bytes to write."""
        self.written = 0
        """Bytes that are written."""

    def start(self) -> None:
        """Begins in a thread."""
        self._thread = start_thread("checkpoint-writer", self._run)

    def wait_until_copied(self) -> None:
        """Returns once the state may change again."""
        self._copied.wait()

    @property
    def finished(self) -> bool:
        """Whether there is a result, or an error."""
        return self._result is not None or self._error is not None

    def abandon(self) -> None:
        """Has the thread give up before its next chunk; returns when it has."""
        self._abandoned.set()
        if self._thread:
            self._thread.join()

    def result(self) -> RankResult | BaseException:
        """What was written, or why not; waits for the thread, or does the work now if none was started."""
        if self._thread:
            self._thread.join()
        else:
            self._run()
        found = self._result or self._error
        assert found is not None
        return found

    def _run(self) -> None:
        try:
            with files.disk_errors(self._path):
                self._result = self._write(self._copy())
        except BaseException as error:  # told to all ranks by `checkpoint`
            self._error = error
        finally:
            self._copied.set()

    @torch.no_grad()
    def _copy(self) -> list[Tensor]:
        originals = [part.tensor for part in self._parts]
        if self._buffer is None:
            return originals
        copies = self._buffer.like(self._parts)
        for copy, original in zip(copies, originals, strict=True):
            self._go_on()
            copy.copy_(original)
        self._copied.set()
        return copies

    @torch.no_grad()
    def _write(self, tensors: list[Tensor]) -> RankResult:
        writer = FileWriter(self._path)
        squares: dict[tuple[str, int | None], float] = defaultdict(float)
        weights: dict[tuple[str, Index], str] = {}
        try:
            for part, tensor in zip(self._parts, tensors, strict=True):
                self._go_on()
                host = tensor.cpu().contiguous()
                writer.add(Chunk(part.key, part.shape, part.offset, host))
                self.written += host.nbytes
                if not part.key.startswith(STATE):
                    squares[part.key, part.offset[0] if is_stack(part.key) else None] += _sum_of_squares(host)
                if host.dtype == torch.float32 and not part.key.startswith(_MOMENTS):
                    weights[part.key, part.offset] = xxhash.xxh3_64_hexdigest(host.view(-1).numpy().data)
            for key, data in self._objects.items():
                writer.add_bytes(key, data)
            self._go_on()
            return RankResult(writer.close(), dict(squares), weights)
        except BaseException:
            writer.abandon()
            raise

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned


def _sum_of_squares(tensor: Tensor) -> float:
    """In float32 over blocks, whose rounding is 1e-7 of each, and in float64 over the blocks."""
    flat = tensor.view(-1)
    whole = len(flat) // NORM_BLOCK * NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK).float(), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:].double())
    return float(blocks.square().sum() + rest.square())
