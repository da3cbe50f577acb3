"""Token stores on disk: the layout of a shard, and reading a window of tokens from many shards as from one stream.

Written by `data/build`; read by `data/batches`, which asks for rows that `data/order` names. A shard is an HDF5 file
with three datasets: `tokens` (1-D, uint16 or uint32, contiguous), `doc_offsets` (int64, documents + 1, in tokens) and
`digests` (uint8, (blocks, 16): xxh3_128 of each 4 MiB of token bytes). HDF5 is asked only where `tokens` begins; from
then on reading is a memory map, as fast as a flat file.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from crystal_hpc.data.catalog import FORMAT, ShardInfo, StoreInfo, read_store_info, rows
from crystal_hpc.data.corpus import Progress
from crystal_hpc.errors import StoreError
from crystal_hpc.files import write_file

BLOCK = 4 << 20  # bytes of tokens under one digest
MOST_MAPPED = 256  # shards mapped at a time: each map holds a file descriptor, and those are limited
REMEDY = "delete the file and run the store's build command again to make it anew, or copy the store again"

Tokens = npt.NDArray[np.unsignedinteger[Any]]


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def block_digests(tokens: Tokens) -> npt.NDArray[np.uint8]:
    """uint8 (blocks, 16): the xxh3_128 of every 4 MiB of a shard's token bytes."""
    data = tokens.view(np.uint8).data
    digests = [xxhash.xxh3_128_digest(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def write_shard(
    path: Path, tokens: Tokens, doc_offsets: npt.NDArray[np.int64], attributes: Mapping[str, int | str]
) -> None:
    """Writes one shard under the commit rule; the same arguments give the same bytes. Raises DiskError.

    The file is put together in memory (a shard is bounded) and written in one go: HDF5 does not recover well from a
    disk that fills up under it.
    """
    # A fixed format version, and no times: nothing in the file may depend on when and with what it was written.
    with h5py.File("shard", "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.attrs["format"] = FORMAT
        file.attrs["documents"] = len(doc_offsets) - 1
        file.attrs["max_token"] = int(tokens.max())
        for name, value in attributes.items():
            file.attrs[name] = value
        file.create_dataset("doc_offsets", data=doc_offsets, dtype="<i8", track_times=False)
        file.create_dataset("digests", data=block_digests(tokens), track_times=False)
        file.create_dataset("tokens", data=tokens, track_times=False)
        file.flush()
        image = file.id.get_file_image()
    write_file(path, image)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A shard opened for reading. Whatever HDF5 stumbles over in it becomes one StoreError."""
    try:
        # Unlocked: many ranks read at once, and some shared file systems refuse locks.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError:
        raise StoreError(f"{path}: the shard is missing; {REMEDY}") from None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise StoreError(f"{path}: the shard is damaged or cannot be read ({_one_line(error)}); {REMEDY}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_shard_info(path: Path) -> ShardInfo:
    """What store.json says of a shard, taken from the shard itself; raises StoreError for a damaged one."""
    with _opened(path) as file:
        digest = xxhash.xxh3_128(file["digests"][:].tobytes())
        digest.update(file["doc_offsets"][:].tobytes())
        return ShardInfo(
            name=path.name,
            documents=int(file.attrs["documents"]),
            tokens=len(file["tokens"]),
            max_token=int(file.attrs["max_token"]),
            bytes=path.stat().st_size,
            digest=digest.hexdigest(),
        )


class TokenStore:
    """A finished store, read as one stream of `tokens` tokens. Opening it opens no shard; each is mapped when needed.

    Arrays come in the store's own type (`info.dtype`). They may be views of the files: read-only, so copy to change.
    Cheap to pickle: a worker process maps the shards for itself.
    """

    def __init__(self, info: StoreInfo) -> None:
        self.info = info
        self.tokens = info.tokens
        self._ends = list(accumulate(shard.tokens for shard in info.shards))
        self._document_ends = list(accumulate(shard.documents for shard in info.shards))
        self._begins: dict[int, int] = {}  # shard number -> byte at which its tokens begin
        self._maps: dict[int, Tokens] = {}

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Opens the store in a folder. Raises StoreError for one that is missing, half-written or incomplete."""
        return cls(read_store_info(Path(folder)))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.info,)

    def rows(self, sequence_length: int) -> int:
        """How many rows of `sequence_length` inputs and as many labels the store yields."""
        return rows(self.tokens, sequence_length)

    def row(self, number: int, sequence_length: int) -> Tokens:
        """Row `number`, sequence_length + 1 tokens: inputs are all but the last, labels all but the first."""
        if not 0 <= number < self.rows(sequence_length):
            raise IndexError(f"row {number} of {self.rows(sequence_length)}")
        return self.read(number * sequence_length, sequence_length + 1)

    def read(self, start: int, count: int) -> Tokens:
        """(count,) tokens of the stream from `start` on, across shards where need be. Raises IndexError outside it."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start}..{start + count} of {self.tokens}")
        pieces = []
        shard = bisect_right(self._ends, start)
        while count > 0:
            begin = start - (self._ends[shard] - self.info.shards[shard].tokens)
            piece = self._mapped(shard)[begin : begin + count]
            pieces.append(piece)
            start, count, shard = start + len(piece), count - len(piece), shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.info.dtype), *pieces])

    def document(self, number: int) -> Tokens:
        """The tokens of document `number` in the shuffled order, with its BOS and EOS. Raises IndexError outside."""
        if not 0 <= number < self.info.documents:
            raise IndexError(f"document {number} of {self.info.documents}")
        shard = bisect_right(self._document_ends, number)
        place = number - (self._document_ends[shard] - self.info.shards[shard].documents)
        with _opened(self._path(shard)) as file:
            begin, end = file["doc_offsets"][place : place + 2]
        return self._mapped(shard)[begin:end]

    def check_digests(self, on_progress: Progress | None = None) -> None:
        """Reads every token and compares with the digests. Raises StoreError with the first damaged block."""
        done = 0
        for number, shard in enumerate(self.info.shards):
            path = self._path(number)
            if read_shard_info(path) != shard:
                raise StoreError(f"{path}: not the shard that store.json describes; {REMEDY}")
            with _opened(path) as file:
                expected = file["digests"][:]
            found = block_digests(self._mapped(number))
            damaged = np.flatnonzero((found != expected).any(axis=1))
            if len(damaged):
                raise StoreError(f"{path}: block {damaged[0]} of {len(found)} of the tokens is damaged; {REMEDY}")
            done += shard.tokens
            if on_progress:
                on_progress("checking", done, self.tokens)

    def _path(self, shard: int) -> Path:
        return self.info.folder / self.info.shards[shard].name

    def _mapped(self, shard: int) -> Tokens:
        """A shard's tokens, memory-mapped."""
        if shard not in self._maps:
            if len(self._maps) >= MOST_MAPPED:
                self._maps.pop(next(iter(self._maps)))  # the oldest; arrays handed out keep their map alive
            self._maps[shard] = self._map(shard)
        return self._maps[shard]

    def _map(self, shard: int) -> Tokens:
        path, info = self._path(shard), self.info.shards[shard]
        if shard not in self._begins:
            with _opened(path) as file:
                dataset = file["tokens"]
                if dataset.dtype != self.info.dtype or dataset.shape != (info.tokens,) or dataset.chunks:
                    raise ValueError("its tokens are not of the recorded type and length")
                self._begins[shard] = dataset.id.get_offset()
        try:
            return np.memmap(path, self.info.dtype, "r", self._begins[shard], (info.tokens,))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path}: the shard is damaged or cannot be read ({_one_line(error)}); {REMEDY}"
            ) from error
