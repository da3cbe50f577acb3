"""Files in the safetensors format, tensor by tensor: what Hugging Face folders keep their weights in.

The library `safetensors` reads and writes the same files, but its writer wants all tensors of a file in memory at once,
and its reader maps the whole file, which a limit on address space (RLIMIT_AS) refuses for large ones. Here a tensor is
read with pread, alone or a range of its rows, and a file is written in order, header first.

The format: 8 bytes with the length of the header, little-endian; the header, JSON: name -> dtype, shape and where the
bytes begin and end, counted from the end of the header; the bytes, row-major, without gaps.
"""

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from crystal_hpc.convert.blocks import BLOCK_BYTES, Background, contiguous
from crystal_hpc.errors import CheckpointError
from crystal_hpc.files import HashedFile, read_into
from crystal_hpc.train.archive import as_bytes

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
MOST_HEADER = 100_000_000  # bytes, as the library has it


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int
    """Where its bytes begin in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """The tensors of one file, by name. Raises CheckpointError, in one line, for a file that is not in the format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Nothing can be read any more."""
        os.close(self._descriptor)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def read(self, name: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        """A tensor, or rows [start, stop) of it, on the CPU, in the dtype it is stored in.

        `into`: a contiguous tensor of that shape and dtype, to be filled instead of a new one.
        """
        stored = self.tensors[name]
        if not stored.shape:
            rows: tuple[int, ...] = ()
            first = 0
        else:
            stop = stored.shape[0] if stop is None else stop
            if not 0 <= start <= stop <= stored.shape[0]:
                raise ValueError(f"rows [{start}, {stop}) of a tensor of shape {stored.shape}")
            rows, first = (stop - start, *stored.shape[1:]), start * math.prod(stored.shape[1:])
        result = torch.empty(rows, dtype=stored.dtype) if into is None else into
        if result.numel():
            self._fill(result.reshape(-1).view(torch.uint8), stored.at + first * stored.dtype.itemsize, name)
        return result

    def read_ahead(self, name: str) -> None:
        """Asks the kernel to fetch a tensor, and returns at once."""
        stored = self.tensors[name]
        os.posix_fadvise(self._descriptor, stored.at, stored.nbytes, os.POSIX_FADV_WILLNEED)

    def _fill(self, target: Tensor, at: int, name: str) -> None:
        try:
            read_into(self._descriptor, as_bytes(target), at)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error.strerror})") from error
        except EOFError:
            raise CheckpointError(f"{self.path}: ends within {name}; fetch the file again") from None

    def _read_header(self) -> dict[str, Stored]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            said = f"its header would be {length:,} bytes long" if size >= 8 else f"has {size} bytes"
            raise self._damaged(f"{said}, and the file has {size:,}" if size >= 8 else said)
        try:
            header = json.loads(os.pread(self._descriptor, length, 8), object_pairs_hook=_no_name_twice)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is no JSON ({str(error).splitlines()[0]})") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        header.pop(METADATA, None)
        tensors, spans = {}, []
        for name, about in header.items():
            dtype, shape, begin, end = self._parse(name, about)
            tensors[name] = Stored(dtype, shape, 8 + length + begin)
            spans.append((begin, end, name))
        self._check_spans(spans, size - 8 - length)
        return tensors

    def _parse(self, name: str, about: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        try:
            kind, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise self._damaged(f"its header lacks dtype, shape or data_offsets of {name!r}") from None
        if not isinstance(kind, str) or kind not in DTYPES:
            raise self._damaged(f"{name} has the dtype {kind!r}; known are {', '.join(DTYPES)}")
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise self._damaged(f"shape {shape!r} or offsets {begin!r}, {end!r} of {name} are no whole numbers")
        dtype = DTYPES[kind]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise self._damaged(f"{name} has {end - begin:,} bytes, which do not make {kind} of shape {shape}")
        return dtype, tuple(shape), begin, end

    def _check_spans(self, spans: list[tuple[int, int, str]], size: int) -> None:
        """Tensors must lie in the file one after the other: no overlap, no gap, nothing behind the last."""
        at = 0
        for begin, end, name in sorted(spans):
            if begin != at:
                raise self._damaged(f"{name} begins at byte {begin:,} and not at {at:,}, where the one before ends")
            at = end
        if at != size:
            said = "it was cut short; fetch it again" if at > size else "more than its header says"
            raise self._damaged(f"has {size:,} bytes of tensors instead of {at:,}: {said}")

    def _damaged(self, said: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: is no intact safetensors file: {said}")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands in it twice")
    return names


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its size, its xxh3-128 digest, and that of the bytes of each tensor, by name."""

    bytes: int
    digest: str
    tensors: dict[str, str]


class SafetensorsWriter:
    """Writes one file, tensor after tensor, in the order of `layout`: name -> (dtype, shape).

    Bytes go out in the background. Refusals of the disk are OSErrors. Used as a context: leaving it with an error
    closes the file as it is.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._layout = dict(layout)
        self._left = list(layout)
        self._digests: dict[str, str] = {}
        self._file: HashedFile | None = HashedFile(path)
        self._background = Background()
        self._file.write(_header(self._layout))

    def write(self, name: str, tensor: Tensor) -> "Future[Any]":
        """Appends the tensor whose turn it is; in any memory order, rounded to the dtype it has in the layout.

        Returns at once; the tensor must stay as it is until what is returned, and so all before it, is done.
        """
        dtype, shape = self._layout[name]
        if not self._left or name != self._left[0] or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not what comes next in the file")
        self._left.pop(0)
        return self._background.submit(self._put, name, contiguous(tensor, dtype))

    def close(self) -> WrittenFile:
        """Forces the file to the disk."""
        self._background.wait()
        if self._left:
            raise ValueError(f"{self._left[0]} was not written")
        assert self._file is not None
        file, self._file = self._file, None
        file.close()
        return WrittenFile(file.tell(), file.digest(), self._digests)

    def _put(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        digest, view = xxhash.xxh3_128(), as_bytes(tensor)
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]  # still in the processor's cache when it is hashed again
            digest.update(block)
            self._file.write(block)
        self._digests[name] = digest.hexdigest()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.abandon()
        if self._file is not None:
            self._file.abandon()


def _header(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header and its length, padded so that the tensors begin at a multiple of 8 bytes."""
    content: dict[str, Any] = {METADATA: {"format": "pt"}}  # without it, Transformers refuses the file
    at = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
