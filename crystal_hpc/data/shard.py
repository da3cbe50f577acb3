"""One shard on disk: documents with their tokens in an HDF5 file that can be read as a flat one.

Written by `data/parts` and `data/merge`, read by `data/store`. All datasets are contiguous:

    doc_offsets   int64 (n + 1)       document i is tokens[doc_offsets[i]:doc_offsets[i + 1]], with its BOS and EOS
    doc_hashes    uint64 (n, 2)       xxh3_128 of its text in UTF-8, high and low half
    id_hashes     uint64 (n, 2)       the same of its id; zeros where it has none
    info_offsets  int64 (n + 1)       its JSON (id, language, path; those it has) is info[info_offsets[i]:...]
    info          uint8
    digests       uint8 (blocks, 16)  xxh3_128 of each 64 KiB of token bytes
    tokens        uint16 or uint32

`ShardInfo.digest` covers everything around the tokens, `digests` the tokens: every byte of the file is accounted for.
HDF5 lays the file out; the bytes are written by plain system calls, which say clearly when the disk is full.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from crystal_hpc.data.catalog import FORMAT, ShardInfo
from crystal_hpc.errors import StoreError
from crystal_hpc.files import PENDING, disk_errors, fsync_path

# Bytes of tokens under one digest: about what the system reads ahead for a row anyway, so that checking a block when
# a row of it is first read asks the disk for little more than the row did.
BLOCK = 1 << 16
ALIGNMENT = 4096  # of every dataset in the file
PIECE = 1 << 26  # bytes handed to the system at a time
REMEDY = "delete the file and run the store's build command again to make it anew, or copy the store again"

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Documents:
    """What a shard says of its n documents beside their tokens; see the module's table."""

    offsets: Offsets
    hashes: Hashes
    id_hashes: Hashes
    info_offsets: Offsets
    info: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.hashes)

    def datasets(self) -> dict[str, npt.NDArray[Any]]:
        """By the names that they have in the file, in their order there."""
        return {
            "doc_offsets": self.offsets.astype("<i8", copy=False),
            "doc_hashes": self.hashes.astype("<u8", copy=False),
            "id_hashes": self.id_hashes.astype("<u8", copy=False),
            "info_offsets": self.info_offsets.astype("<i8", copy=False),
            "info": self.info,
        }


def block_digests(tokens: Tokens) -> npt.NDArray[np.uint8]:
    """uint8 (blocks, 16): the xxh3_128 of every block of a shard's token bytes."""
    data = np.ascontiguousarray(tokens).view(np.uint8).data
    digest = xxhash.xxh3_128_digest
    digests = [digest(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def write_shard(path: Path, documents: Documents, tokens: Tokens, attributes: Mapping[str, int | str]) -> ShardInfo:
    """Writes one shard under the commit rule; the same arguments give the same bytes. Raises DiskError.

    `tokens` are those of all documents, one after another, at least one.
    """
    pending = path.with_name(f"{path.name}.{os.getpid()}{PENDING}")
    arrays = {**documents.datasets(), "digests": block_digests(tokens), "tokens": tokens}
    about = {"format": FORMAT, "documents": len(documents), "max_token": int(tokens.max()), **attributes}
    with disk_errors(path):
        try:
            places = lay_out(pending, arrays, about)
            with open(pending, "r+b", buffering=0) as file:
                for name, array in arrays.items():
                    _write_at(file.fileno(), array, places[name])
                os.fsync(file.fileno())
            info = _describe(pending, path.name, about, tokens, places)
            os.replace(pending, path)
            fsync_path(path.parent)
        finally:
            pending.unlink(missing_ok=True)
    return info


def lay_out(path: Path, arrays: Mapping[str, npt.NDArray[Any]], attributes: Mapping[str, Any]) -> dict[str, int]:
    """Makes the file with room for every array, and returns where each begins; 0 for one without elements."""
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    # A fixed format version, and no times: nothing in the file may depend on when and with what it was written.
    options: dict[str, Any] = {"libver": ("v110", "v110"), "alignment_threshold": 1, "alignment_interval": ALIGNMENT}
    with h5py.File(path, "w", **options) as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        made = {}
        for name, array in arrays.items():
            kind, space = h5py.h5t.py_create(array.dtype), h5py.h5s.create_simple(array.shape)
            made[name] = h5py.h5d.create(file.id, name.encode(), kind, space, create)
        return {name: dataset.get_offset() or 0 for name, dataset in made.items()}


def _write_at(descriptor: int, array: npt.NDArray[Any], place: int) -> None:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + PIECE], place + done)


def _describe(
    path: Path, name: str, attributes: Mapping[str, Any], tokens: Tokens, places: Mapping[str, int]
) -> ShardInfo:
    return ShardInfo(
        name=name,
        documents=int(attributes["documents"]),
        tokens=len(tokens),
        max_token=int(attributes["max_token"]),
        bytes=path.stat().st_size,
        tokens_at=places["tokens"],
        digests_at=places["digests"],
        digest=frame_digest(path, places["tokens"], tokens.nbytes),
    )


def frame_digest(path: Path, tokens_at: int, tokens_bytes: int) -> str:
    """xxh3-128 in hex of a shard's bytes before and after its tokens: HDF5's own, documents and block digests."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        for start, stop in ((0, tokens_at), (tokens_at + tokens_bytes, os.fstat(file.fileno()).st_size)):
            file.seek(start)
            while start < stop and (piece := file.read(min(stop - start, PIECE))):
                digest.update(piece)
                start += len(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """A shard opened for reading. Whatever HDF5 stumbles over in it becomes one StoreError."""
    try:
        # Unlocked: many ranks read at once, and some shared file systems refuse locks.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError:
        raise StoreError(f"{path}: the shard is missing; {REMEDY}") from None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> StoreError:
    """What to say of a shard that gave this error."""
    said = " ".join(str(error).split()) or type(error).__name__
    return StoreError(f"{path}: the shard is damaged or cannot be read ({said}); {REMEDY}")


def read_shard_info(path: Path) -> ShardInfo:
    """What store.json says of a shard, taken from the shard itself; raises StoreError for a damaged one."""
    with opened(path) as file:
        places = {name: file[name].id.get_offset() for name in ("tokens", "digests")}
        return _describe(path, path.name, dict(file.attrs), file["tokens"], places)


def read_documents(path: Path, start: int = 0, stop: int | None = None) -> Documents:
    """What a shard says of documents start..stop-1 (default: all); offsets begin with those of `start`, not with 0.

    Raises StoreError for a damaged shard.
    """
    with opened(path) as file:
        stop = len(file["doc_hashes"]) if stop is None else stop
        info_offsets = file["info_offsets"][start : stop + 1]
        return Documents(
            offsets=file["doc_offsets"][start : stop + 1],
            hashes=file["doc_hashes"][start:stop],
            id_hashes=file["id_hashes"][start:stop],
            info_offsets=info_offsets,
            info=file["info"][info_offsets[0] : info_offsets[-1]],
        )


def read_hashes(path: Path, column: str) -> Hashes:
    """`doc_hashes` or `id_hashes` of a shard, uint64 (n, 2). Raises StoreError for a damaged shard."""
    with opened(path) as file:
        hashes: Hashes = file[column][:]
        return hashes


def shuffle_keys(hashes: Hashes, seed: int) -> Hashes:
    """uint64 (n, 2): by which documents with these hashes are sorted under a seed; a bijection, so equal texts only
    have equal keys."""
    high, low = divmod(xxhash.xxh3_128_intdigest(f"shuffle {seed}".encode()), 1 << 64)
    keys = (hashes ^ np.array([high, low], np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    mixed: Hashes = keys ^ (keys >> np.uint64(32))
    return mixed
