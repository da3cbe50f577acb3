"""The files of a distributed checkpoint: chunks of tensors in, chunks out. Torch only; no Megatron, no process groups.

The format is torch.distributed.checkpoint's, as Megatron-core's `torch_dist` uses it: a tensor of the whole model under
one key, cut into boxes, each saved with torch.save somewhere in some `.distcp` file; `.metadata` says which is where.
Any layout writes it, and any other reads it: a reader asks for the boxes it needs. `sharding` says which boxes a rank
has, `checkpoint` decides when a folder counts, `convert` reads and writes whole models.

We write the files ourselves, for three reasons: a digest is taken of the bytes on their way out, a save can be given up
between two chunks, and nothing starts helper processes, which would need shielding from a job's signals. We read them
ourselves because `.metadata` is a pickle: here it may name the few classes that belong in it and nothing else.
"""

import contextlib
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train import archive

METADATA = ".metadata"
INDEX_FILES = (METADATA, "metadata.json", "common.pt")
LARGEST_CHUNK = 64 << 20  # bytes; a reader has to load a chunk whole, however little of it it needs
FOR_MEGATRON = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}

# What a damaged pickle or archive may come to.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, pickle.PickleError)

Index = tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a tensor of the whole model."""

    key: str
    shape: Index
    """Of the whole tensor."""
    offset: Index
    """Where the box begins in it."""
    tensor: Tensor
    """The box; contiguous."""


class Placed(NamedTuple):
    """Where a box was written."""

    key: str
    dtype: torch.dtype | None
    """None for bytes that are no tensor."""
    shape: Index
    offset: Index
    size: Index
    file: str
    at: int
    length: int


@dataclass(frozen=True)
class Written:
    """A finished file: its size and xxh3-128 digest, and what is in it."""

    name: str
    bytes: int
    digest: str
    placed: list[Placed]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    """The (offset, size) of boxes that make up elements [start, stop) of a row-major tensor, in their order.

    At most 2 * len(shape) - 1 of them: the ends of a range that begins or ends inside a row, and the rows between.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows that are whole
    if first > last:
        first, last = start // row, start // row  # begins and ends inside one row
        yield from _in_row(first, shape, start, stop)
        return
    yield from _in_row(first - 1, shape, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, shape, last * row, stop)


def _in_row(number: int, shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    row = math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - number * row, stop - number * row):
        yield (number, *offset), (1, *size)


class FileWriter:
    """Writes one `.distcp` file, chunk after chunk. Its digest is that of the bytes that were handed to the disk."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._stream = files.HashedFile(path)
        self._placed: list[Placed] = []

    def add(self, chunk: Chunk) -> None:
        """Appends a chunk, in pieces of at most `LARGEST_CHUNK` bytes; its tensor is on the CPU."""
        for offset, part in _pieces(chunk.tensor):
            at = self._stream.tell()
            with _without_crc32():
                torch.save(_alone(part), cast(IO[bytes], self._stream))
            place = tuple(a + b for a, b in zip(chunk.offset, offset, strict=True))
            length = self._stream.tell() - at
            self._placed.append(
                Placed(chunk.key, part.dtype, chunk.shape, place, tuple(part.shape), self._name, at, length)
            )

    def add_bytes(self, key: str, data: bytes) -> None:
        """Appends something that is no tensor; nothing here reads it again."""
        at = self._stream.tell()
        self._stream.write(data)
        self._placed.append(Placed(key, None, (), (), (), self._name, at, len(data)))

    def close(self) -> Written:
        """Forces the file to the disk."""
        self._stream.close()
        return Written(self._name, self._stream.tell(), self._stream.digest(), self._placed)

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._stream.abandon()


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Spares torch.save the CRC-32 of its archive, some 0.3 s a gigabyte; torch.load does not look at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _pieces(tensor: Tensor) -> Iterator[tuple[Index, Tensor]]:
    """The tensor in contiguous parts of at most `LARGEST_CHUNK` bytes: along its first axis, then along the next."""
    axis = next((axis for axis, length in enumerate(tensor.shape) if length > 1), None)
    if axis is None or tensor.nbytes <= LARGEST_CHUNK:
        yield (0,) * tensor.ndim, tensor
        return
    step = max(1, LARGEST_CHUNK * tensor.shape[axis] // tensor.nbytes)
    for start in range(0, tensor.shape[axis], step):
        part = tensor.narrow(axis, start, min(step, tensor.shape[axis] - start))
        for offset, piece in _pieces(part):
            yield tuple(offset[at] + start * (at == axis) for at in range(tensor.ndim)), piece


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a tensor whose storage is no larger than itself: torch.save would write all of a storage."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    as_bytes = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return as_bytes.view(tensor.dtype).view(tensor.shape)


def write_index(folder: Path, placed: Iterable[Placed]) -> None:
    """Writes `.metadata`, and the two small files by which Megatron-core knows a checkpoint of its own.

    The caller forces the folder to the disk, before it counts.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for one in placed:
        info = _StorageInfo(one.file, one.at, one.length)
        if one.dtype is None:
            entries[one.key], storage[MetadataIndex(one.key)] = BytesStorageMetadata(), info
            continue
        stored = entries.setdefault(
            one.key, TensorStorageMetadata(TensorProperties(one.dtype), torch.Size(one.shape), [])
        )
        assert isinstance(stored, TensorStorageMetadata), one.key
        index = MetadataIndex(one.key, one.offset, len(stored.chunks))
        stored.chunks.append(ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.size)))
        storage[index] = info
    metadata = Metadata(entries, storage_data=storage, version="1.0.0")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps(FOR_MEGATRON) + "\n")
    torch.save({}, folder / "common.pt")


class Request(NamedTuple):
    """A box to read: it begins at `offset` of the tensor `key` and has the shape of `target`, which it fills."""

    key: str
    offset: Index
    target: Tensor


class Reader:
    """The tensors of a checkpoint folder, by key. Raises CheckpointError where the folder's index cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        for file in {str(place.relative_path) for place in self._places.values()}:
            if file != Path(file).name:
                raise CheckpointError(f"{folder / METADATA}: names {file}, which is no file of this folder")

    def shape(self, key: str) -> Index:
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def read(self, requests: Iterable[Request]) -> None:
        """Fills the targets, in whatever dtype they have; each stored chunk is loaded once.

        Raises CheckpointError for a tensor that is not there or not whole, and for bytes that cannot be read.
        """
        wanted: dict[str, dict[MetadataIndex, list[tuple[ChunkStorageMetadata, Request]]]] = defaultdict(dict)
        for request in requests:
            for index, chunk in self._overlapping(request):
                wanted[self._places[index].relative_path].setdefault(index, []).append((chunk, request))
        for name, chunks in wanted.items():
            try:
                with open(self.folder / name, "rb") as file:
                    for index in sorted(chunks, key=lambda index: self._places[index].offset):
                        self._fill(file, index, chunks[index])
            except _UNREADABLE as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CheckpointError(f"{self.folder / name}: cannot be read ({reason})") from error

    def _overlapping(self, request: Request) -> Iterator[tuple[MetadataIndex, ChunkStorageMetadata]]:
        if request.key not in self.tensors:
            raise CheckpointError(f"{self.folder}: has no tensor {request.key}")
        common = []
        for number, chunk in enumerate(self.tensors[request.key].chunks):
            begin, sizes = _common(chunk.offsets, chunk.sizes, request.offset, request.target.shape)
            if len(sizes) != request.target.ndim or any(size <= 0 for size in sizes):
                continue
            common.append((begin, sizes))
            yield MetadataIndex(request.key, chunk.offsets, number), chunk
        if not _are_disjoint(common):
            raise CheckpointError(f"{self.folder}: holds some numbers of {request.key} twice")
        covered = sum(math.prod(sizes) for _, sizes in common)
        if covered != request.target.numel():
            raise CheckpointError(
                f"{self.folder}: holds {covered} of the {request.target.numel()} numbers wanted of {request.key}"
            )

    def _fill(self, file: Any, index: MetadataIndex, wanted: list[tuple[ChunkStorageMetadata, Request]]) -> None:
        place = self._places[index]
        view = cast(IO[bytes], archive.Part(file, place.offset, place.length))
        found = archive.find_numbers(view, tuple(wanted[0][0].sizes))
        stored = None
        for chunk, request in wanted:
            begin, sizes = _common(chunk.offsets, chunk.sizes, request.offset, request.target.shape)
            target = _cut(request.target, begin, sizes, request.offset)
            if found is not None and _can_be_filled(target, found.dtype):
                box = _cut(torch.empty(chunk.sizes, dtype=found.dtype, device="meta"), begin, sizes, chunk.offsets)
                if box.is_contiguous():
                    at = place.offset + found.at + int(box.storage_offset()) * box.itemsize
                    files.read_into(file.fileno(), archive.as_bytes(target), at)
                    continue
            if stored is None:
                # A pickle may be among the bytes, and `weights_only` lets it name tensors alone.
                view.seek(0)
                stored = torch.load(view, weights_only=True)
            target.copy_(_cut(stored, begin, sizes, chunk.offsets))


def _cut(tensor: Tensor, begin: Sequence[int], sizes: Sequence[int], offset: Sequence[int]) -> Tensor:
    """A box of the whole tensor, out of one that itself begins at `offset`."""
    for axis, (at, size) in enumerate(zip(begin, sizes, strict=True)):
        tensor = tensor.narrow(axis, at - offset[axis], size)
    return tensor


def _can_be_filled(target: Tensor, dtype: torch.dtype) -> bool:
    return target.is_contiguous() and target.dtype == dtype and target.device.type == "cpu"


def _common(
    a_offset: Sequence[int], a_size: Sequence[int], b_offset: Sequence[int], b_size: Sequence[int]
) -> tuple[Index, Index]:
    """Offset and size of what two boxes have in common; a size below one where they have nothing."""
    begin = tuple(max(a, b) for a, b in zip(a_offset, b_offset, strict=False))
    ends = (min(a + m, b + n) for a, m, b, n in zip(a_offset, a_size, b_offset, b_size, strict=False))
    return begin, tuple(end - at for at, end in zip(begin, ends, strict=False))


def _are_disjoint(boxes: Sequence[tuple[Index, Index]]) -> bool:
    """Whether no two of the boxes, each an offset and a size, have a number in common."""
    begin, sizes = np.array([at for at, _ in boxes]), np.array([size for _, size in boxes])
    end = begin + sizes
    pairs = ((begin[:, None] < end) & (begin < end[:, None])).all(axis=-1)
    return int(np.count_nonzero(pairs)) == len(boxes)  # each with itself


def read_metadata(folder: Path) -> Metadata:
    """The index of a checkpoint folder, without running anything that its pickle might ask for."""
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {METADATA}, so it is no distributed checkpoint") from None
    except _UNREADABLE as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path}: is not the index of a distributed checkpoint")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that torch.distributed.checkpoint and Megatron-core put into `.metadata`, and no others."""

    KNOWN = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"Path", "PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self.KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which has no business there")
