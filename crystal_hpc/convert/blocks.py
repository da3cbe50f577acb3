"""Moving large tensors in small steps: blockwise copies and norms, and work in the background.

What the streams of `weights` and `from_hf` are made of. A block is a few MiB, so that it is still in the processor's
cache when it is hashed and handed to the kernel, and so that memory does not depend on the tensor.
"""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20
ALIGNED = 64  # bytes: where a tensor may begin
SMALL_BYTES = 1 << 20
LONGEST_QUEUE = 8  # so many small tensors may wait
# A tile of a transpose, rows and columns of the source: both its copies stay in the cache (2 GB/s a core; a plain
# copy_ of a transposed view reads a cache line for each number, 0.25 GB/s).
TILE = (512, 256)


class Background:
    """One thread that does one thing after another. What one of them raises, a later `submit` or `wait` raises.

    Torch computes in it with one thread of its own (the number counts for the thread that sets it), so that norms do
    not depend on how many the environment allows.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._waiting: deque[Future[Any]] = deque()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Puts `work` at the end of the queue; waits where that is long already."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= LONGEST_QUEUE):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work, *arguments))
        return self._waiting[-1]

    def wait(self) -> None:
        """Returns when nothing is under way."""
        while self._waiting:
            self._waiting.popleft().result()

    def abandon(self) -> None:
        """Ends the thread once what is under way is done, however that went; what waits is not begun."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: Any) -> None:
        self.abandon()


class Arena:
    """Memory for a few tensors, used again for the next few: touching new memory takes longer than filling it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._user: Future[Any] | None = None

    def tensors(self, wanted: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """Contiguous tensors of these shapes and dtypes, of arbitrary content; those of the last call are gone."""
        user, self._user = self._user, None
        if user is not None:
            user.result()
        starts, end = [], 0
        for shape, dtype in wanted:
            starts.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        if end > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # before there is more
            self._bytes = torch.empty(end, dtype=torch.uint8)
        return [
            self._bytes[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(starts, wanted, strict=True)
        ]

    def keep_for(self, user: "Future[Any]") -> None:
        """The tensors stay until this is done."""
        self._user = user


class Arenas:
    """Two arenas in turn: one is filled while a background writes out the other. Small tensors get memory of their own.

    With two alone, a long tensor before a short one would be waited for before the next long one is begun.
    """

    def __init__(self) -> None:
        self._turns = itertools.cycle([Arena(), Arena()])

    def next(self, nbytes: int) -> Arena:
        """For tensors of so many bytes together."""
        return next(self._turns) if nbytes > SMALL_BYTES else Arena()


def copy(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, at the speed of memory where matrices are transposed on the way."""
    if target.ndim > 2:
        for some, other in zip(target, source, strict=True):
            copy(some, other)
        return
    if _by_columns(target):
        target, source = target.T, source.T
    if not _by_columns(source):
        target.copy_(source)
        return
    rows, columns = TILE
    for j in range(0, source.shape[1], rows):
        for i in range(0, source.shape[0], columns):
            tile = source[i : i + columns, j : j + rows]
            target[i : i + columns, j : j + rows] = tile.T.contiguous().T.contiguous()


def _by_columns(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.stride(0) == 1 < tensor.stride(1)


def contiguous(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor in row-major order, in `dtype`; itself where it is so already."""
    dtype = dtype or tensor.dtype
    if tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor
    result = torch.empty(tensor.shape, dtype=dtype)
    copy(result, tensor)
    return result


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread: the streams have threads of their own, and torch's would spin between blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Norm:
    """The Euclidean norm of what is added, in any order of the numbers; summed up in float64 over blocks of float32."""

    def __init__(self) -> None:
        self._squares = 0.0

    def add(self, tensor: Tensor) -> "Norm":
        """Takes in all numbers of a contiguous tensor."""
        for part in torch.split(tensor.reshape(-1), 1 << 16):
            numbers = part.float()
            self._squares += float(torch.dot(numbers, numbers))
        return self

    @property
    def value(self) -> float:
        return math.sqrt(self._squares) if self._squares >= 0 else math.nan
