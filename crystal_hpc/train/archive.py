"""Where the numbers of a tensor lie in an archive of torch.save, so that they can be read into memory that is there.

torch.load takes new memory for what it reads, which costs as much as the reading. `distcp` asks here first, and leaves
to torch.load what is no plain tensor. Nothing in a pickle is executed.
"""

import io
import os
import pickle
import struct
import sys
import zipfile
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from crystal_hpc import files

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


# What a pickle or archive may come to that is not as torch.save leaves one tensor.
_NOT_PLAIN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError, EOFError, RuntimeError),
    *(ValueError, LookupError, AttributeError, TypeError, NotImplementedError),
)


File = IO[bytes] | io.RawIOBase


class Numbers(NamedTuple):
    """A tensor's numbers, row-major, in an archive."""

    dtype: torch.dtype
    at: int
    """Their first byte, counted from the start of the archive."""


class Part(io.RawIOBase):
    """A stretch of an open file as a file of its own; that of torch.distributed.checkpoint miscounts from its end."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._length, self._at = file.fileno(), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence] + offset
        if self._at < 0:
            raise OSError("a place before the beginning")
        return self._at

    def readinto(self, target: Any) -> int:
        """Raises EOFError where the file ends before the stretch does."""
        view = memoryview(target).cast("B")[: max(self._length - self._at, 0)]
        files.read_into(self._descriptor, view, self._start + self._at)
        self._at += len(view)
        return len(view)


def find_numbers(archive: File, shape: tuple[int, ...]) -> Numbers | None:
    """Where the numbers of a tensor of this shape are; None for anything but a whole archive of one plain tensor."""
    try:
        with zipfile.ZipFile(archive) as entries:
            records = {entry.filename.partition("/")[2]: entry for entry in entries.infolist()}
        pickled = _content(archive, records["data.pkl"])
        order = _content(archive, records["byteorder"]) if "byteorder" in records else sys.byteorder.encode()
        (dtype, number), offset, size, stride = _TensorUnpickler(io.BytesIO(pickled)).load()
        record = records[f"data/{number}"]
        at = _start(archive, record)
    except _NOT_PLAIN:
        return None
    plain = torch.empty(shape, dtype=dtype, device="meta")
    row_major = (offset, tuple(size), tuple(stride)) == (0, shape, plain.stride())
    stored = record.compress_type == zipfile.ZIP_STORED and record.file_size == plain.nbytes
    if not row_major or not stored or order != sys.byteorder.encode():
        return None
    return Numbers(dtype, at)


def _content(archive: File, record: zipfile.ZipInfo) -> bytes:
    """A record that is not packed, whether or not its CRC-32 is right: ours have none, for the sake of speed."""
    archive.seek(_start(archive, record))
    return archive.read(record.file_size) or b""


def _start(archive: File, record: zipfile.ZipInfo) -> int:
    """The first byte of a record: after its header of 30 bytes, its name and its padding (APPNOTE.TXT 4.3.7)."""
    archive.seek(record.header_offset + 26)
    name, padding = struct.unpack("<HH", archive.read(4))
    return record.header_offset + 30 + int(name) + int(padding)


class _TensorUnpickler(pickle.Unpickler):
    """Takes a pickle of one tensor to ((dtype, record), offset, size, stride), and runs nothing of it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict  # of hooks, of which a saved tensor has none
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, saved: Any) -> tuple[torch.dtype, str]:
        _, dtype, record, _, _ = saved
        return dtype, record


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
