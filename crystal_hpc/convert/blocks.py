"""Moving large tensors in small steps: blockwise copies and norms, and work in the background.

What the streams of `weights` and `from_hf` are made of. A block is a few MiB, so that it is still in the processor's
cache when it is hashed and handed to the kernel, and so that memory does not depend on the tensor.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20
# A tile of a transpose, rows and columns of the source: both its copies stay in the cache (2 GB/s a core; a plain
# copy_ of a transposed view reads a cache line for each number, 0.25 GB/s).
TILE = (512, 256)


class Background:
    """One thread that does one thing at a time; `submit` waits for the thing before and raises what it raised."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[Any] | None = None

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Starts `work` once the work before is done."""
        self.wait()
        self._last = self._pool.submit(work, *arguments)

    def wait(self) -> None:
        """Returns when nothing is under way."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def abandon(self) -> None:
        """Ends the thread once what is under way is done, however that went."""
        self._pool.shutdown()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: Any) -> None:
        self.abandon()


class Blocks:
    """The bytes of tensors, block by block, through two buffers that take turns."""

    def __init__(self, nbytes: int = BLOCK_BYTES) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(2)]
        self._turn = 0

    def of(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """Contiguous 1-D uint8 tensors that together are the row-major bytes of `tensor` in `dtype`.

        A block is good until two more have been asked for. Bytes that lie right already are not copied.
        """
        dtype = dtype or tensor.dtype
        if tensor.numel() == 0:
            return
        if tensor.is_contiguous():
            flat = tensor.reshape(-1)
            step = len(self._buffers[0]) // dtype.itemsize
            for part in torch.split(flat, step):
                yield part.view(torch.uint8) if part.dtype == dtype else self._copied(part, dtype)
            return
        row = math.prod(tensor.shape[1:])
        rows = len(self._buffers[0]) // (row * dtype.itemsize)
        if rows == 0:
            for part in tensor:
                yield from self.of(part, dtype)
            return
        for part in torch.split(tensor, rows):
            yield self._copied(part, dtype)

    def _copied(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers[self._turn][: part.numel() * dtype.itemsize]
        self._turn = 1 - self._turn
        copy(buffer.view(dtype).view(part.shape), part)
        return buffer


def copy(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, at the speed of memory where a matrix is transposed on the way."""
    if source.ndim != 2 or source.stride(0) != 1 or source.stride(1) == 1 or not target.is_contiguous():
        target.copy_(source)
        return
    rows, columns = TILE
    for j in range(0, source.shape[1], rows):
        for i in range(0, source.shape[0], columns):
            tile = source[i : i + columns, j : j + rows]
            target[i : i + columns, j : j + rows] = tile.T.contiguous().T.contiguous()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def contiguous(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor in row-major order, in `dtype`; itself where it is so already."""
    dtype = dtype or tensor.dtype
    if tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor
    result = torch.empty(tensor.shape, dtype=dtype)
    copy(result, tensor)
    return result


def transposed_in_memory(tensor: Tensor) -> Tensor:
    """The same matrix, column after column: what is then done with its transpose is done with whole rows."""
    return contiguous(tensor.T).T


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
