"""Reading a token store: a window of tokens from many shards as from one stream.

`data/rows` asks it for the rows that `data/order` names. store.json says where in each shard the tokens begin
(`data/shard`), so reading is a memory map, as fast as a flat file, and HDF5 is asked only about documents. A block of
tokens is compared with its digest when something of it is read for the first time.
"""

import mmap
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from crystal_hpc.data.catalog import ShardInfo, StoreInfo, read_store_info, rows
from crystal_hpc.data.shard import BLOCK, REMEDY, Documents, Tokens, damaged, frame_digest, read_documents
from crystal_hpc.errors import StoreError
from crystal_hpc.progress import Progress

MOST_MAPPED = 256  # shards mapped at a time: each map holds a file descriptor, and those are limited


class _Mapped:
    """The tokens of one shard, memory-mapped, with the blocks that were found good so far."""

    def __init__(self, path: Path, info: ShardInfo, dtype: np.dtype[Any]) -> None:
        """Raises StoreError where the file cannot be read, or is not as long as it should be."""
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.tokens: Tokens = np.frombuffer(data, dtype, info.tokens, info.tokens_at)
            blocks = -(-self.tokens.nbytes // BLOCK)
            self._digests = data[info.digests_at : info.digests_at + 16 * blocks]
        except FileNotFoundError:
            raise StoreError(f"{path}: the shard is missing; {REMEDY}") from None
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error
        self.path = path
        self._bytes = memoryview(data)[info.tokens_at : info.tokens_at + self.tokens.nbytes]
        self._good = bytearray(blocks)

    def check(self, start: int, stop: int) -> None:
        """Compares the blocks that hold tokens start..stop-1, and were not yet looked at, with their digests.

        Raises StoreError for a damaged one.
        """
        size = self.tokens.itemsize
        first, last = start * size // BLOCK, (stop * size - 1) // BLOCK
        if self._good.find(0, first, last + 1) < 0:
            return
        for block in range(first, last + 1):
            if not self._good[block]:
                found = xxhash.xxh3_128_digest(self._bytes[block * BLOCK : (block + 1) * BLOCK])
                if found != self._digests[16 * block : 16 * block + 16]:
                    raise damaged_block(self.path, block, len(self._good))
                self._good[block] = 1


def damaged_block(path: Path, block: int, blocks: int) -> StoreError:
    """What to say of a block of tokens that is not what its digest says."""
    return StoreError(f"{path}: block {block} of {blocks} of the tokens is damaged; {REMEDY}")


class TokenStore:
    """A finished store, read as one stream of `tokens` tokens. Opening it opens no shard; each is mapped when needed.

    Arrays come in the store's own type (`info.dtype`). They may be views of the files: read-only, so copy to change.
    Cheap to pickle: a worker process maps the shards for itself.
    """

    def __init__(self, info: StoreInfo, check: bool = True) -> None:
        """With `check`, a block of tokens is compared with its digest when it is first read."""
        self.info = info
        self._check = check
        self.tokens = info.tokens
        self._ends = list(accumulate(shard.tokens for shard in info.shards))
        self._document_ends = list(accumulate(shard.documents for shard in info.shards))
        self._dtype = np.dtype(info.dtype).newbyteorder("<")
        self._maps: dict[int, _Mapped] = {}

    @classmethod
    def open(cls, folder: Path, check: bool = True) -> "TokenStore":
        """Opens the store in a folder. Raises StoreError for one that is missing, half-written or incomplete."""
        return cls(read_store_info(Path(folder)), check)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.info, self._check)

    def rows(self, sequence_length: int) -> int:
        """How many rows of `sequence_length` inputs and as many labels the store yields."""
        return rows(self.tokens, sequence_length)

    def row(self, number: int, sequence_length: int) -> Tokens:
        """Row `number`, sequence_length + 1 tokens: inputs are all but the last, labels all but the first."""
        if not 0 <= number < self.rows(sequence_length):
            raise IndexError(f"row {number} of {self.rows(sequence_length)}")
        return self.read(number * sequence_length, sequence_length + 1)

    def read_row(self, number: int, sequence_length: int) -> tuple[Tokens, Tokens, None]:
        """Row `number` as training takes it: inputs and labels (sequence_length,), every label counts."""
        row = self.row(number, sequence_length)
        return row[:-1], row[1:], None

    def read(self, start: int, count: int) -> Tokens:
        """(count,) tokens of the stream from `start` on, across shards where need be.

        Raises IndexError outside of it, StoreError for a damaged block.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start}..{start + count} of {self.tokens}")
        pieces = []
        shard = bisect_right(self._ends, start)
        while count > 0:
            begin = start - (self._ends[shard] - self.info.shards[shard].tokens)
            mapped = self._mapped(shard)
            piece = mapped.tokens[begin : begin + count]
            if self._check:
                mapped.check(begin, begin + len(piece))
            pieces.append(piece)
            start, count, shard = start + len(piece), count - len(piece), shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self._dtype), *pieces])

    def document(self, number: int) -> Tokens:
        """The tokens of document `number` in the shuffled order, with its BOS and EOS. Raises IndexError outside."""
        start, stop = self.document_span(number)
        return self.read(start, stop - start)

    def document_span(self, number: int) -> tuple[int, int]:
        """Where document `number` begins and ends in the stream of tokens. Raises IndexError outside."""
        shard, place = self.place_of(number)
        begin, end = read_documents(self.path(shard), place, place + 1).offsets.tolist()
        before = self._ends[shard] - self.info.shards[shard].tokens
        return before + begin, before + end

    def place_of(self, number: int) -> tuple[int, int]:
        """Shard and place in it of document `number`. Raises IndexError outside."""
        if not 0 <= number < self.info.documents:
            raise IndexError(f"document {number} of {self.info.documents}")
        shard = bisect_right(self._document_ends, number)
        return shard, number - (self._document_ends[shard] - self.info.shards[shard].documents)

    def documents(self, shard: int) -> Documents:
        """What a shard says of its documents; offsets count from its own first token. Raises StoreError."""
        return read_documents(self.path(shard))

    def check_digests(self, on_progress: Progress | None = None) -> None:
        """Reads every byte and compares with the digests. Raises StoreError with the first damaged block."""
        done = 0
        for number, shard in enumerate(self.info.shards):
            self.check_shard(number)
            done += shard.tokens
            if on_progress:
                on_progress("checking", done, self.tokens)

    def check_shard(self, number: int) -> None:
        """Reads every byte of one shard. Raises StoreError with the first damaged block."""
        path, shard = self.path(number), self.info.shards[number]
        mapped = self._mapped(number)
        frame = frame_digest(path, shard.tokens_at, mapped.tokens.nbytes)
        if path.stat().st_size != shard.bytes or frame != shard.digest:
            raise StoreError(f"{path}: damaged around its tokens, or not the shard that store.json describes; {REMEDY}")
        mapped.check(0, shard.tokens)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.info.folder / self.info.shards[shard].name

    def _mapped(self, shard: int) -> _Mapped:
        if shard not in self._maps:
            if len(self._maps) >= MOST_MAPPED:
                self._maps.pop(next(iter(self._maps)))  # the oldest; arrays handed out keep their map alive
            self._maps[shard] = _Mapped(self.path(shard), self.info.shards[shard], self._dtype)
        return self._maps[shard]
