"""Rows as Crystal published them, opened as a source as they are.

A folder of HDF5 files, each with a dataset `data`, int32 (N, 3, L), gzip, a chunk a row: `data[i, 0]` are the token ids
of row i, `data[i, 1]` its loss mask, `data[i, 2]` its labels. Rows are numbered through the files in the order of their
names. There is no store.json: what a run checks is taken from the files, without reading rows. Which tokenizer made
them is not recorded, and there are no digests, so a damaged row is found by what gzip and HDF5 notice of it and by ids
that the model does not have. Beside `store` in the flow of a token; `sources` chooses between the two.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from crystal_hpc.data.catalog import ShardInfo, StoreInfo, digest_of
from crystal_hpc.errors import StoreError
from crystal_hpc.progress import Progress

DATASET = "data"
MOST_OPEN = 64  # files open at a time
REMEDY = "fetch the file again"

Ids = npt.NDArray[np.int32]


def read_published_info(folder: Path) -> StoreInfo:
    """What a folder of published rows holds; rows are counted as documents, and `tokens` is rows * L + 1.

    The digest covers the names, sizes and numbers of rows of the files. Raises StoreError where there is no such
    folder, or a file is not like the others.
    """
    shards, length = [], 0
    for path in sorted(folder.glob("*.h5")):
        with _reading(path):
            file = _open(path)
            count, _, width = file[DATASET].shape
            file.close()
        if width != (length := length or width):
            raise StoreError(f"{path}: rows of {width} tokens, but those before it have {length}; use one folder each")
        size = path.stat().st_size
        identity = digest_of([path.name, f"{size} {count}"])
        shards.append(ShardInfo(path.name, count, count * width, -1, size, 0, 0, identity))
    total = sum(shard.documents for shard in shards)
    if total == 0:
        raise StoreError(f"{folder}: no rows; expected *.h5 files with a dataset {DATASET!r}, int32 (N, 3, L)")
    return StoreInfo(
        folder=folder,
        name=folder.name,
        tokenizer="",
        vocab_size=0,
        max_token=-1,
        dtype="int32",
        documents=total,
        tokens=total * length + 1,
        seed=0,
        bos=None,
        eos=None,
        rejected={},
        shards=tuple(shards),
        digest=digest_of(shard.digest for shard in shards),
        layout="rows",
    )


class PublishedRows:
    """A `RowSource` of published rows. Files are opened when needed; cheap to pickle."""

    def __init__(self, info: StoreInfo, vocab_size: int | None = None) -> None:
        """Ids of `vocab_size` or more are an error when they are read, as the model has nothing for them."""
        assert info.row_length is not None
        self.info = info
        self._length = info.row_length
        self._vocab_size = vocab_size if vocab_size is not None else 1 << 31
        self._ends = list(accumulate(shard.documents for shard in info.shards))
        self._files: dict[int, h5py.File] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PublishedRows, (self.info, self._vocab_size)

    def rows(self, sequence_length: int) -> int:
        """All of them if they have this length, else none."""
        return self.info.documents if sequence_length == self._length else 0

    def read_row(self, number: int, sequence_length: int) -> tuple[Ids, Ids, npt.NDArray[np.bool_]]:
        """Inputs, labels and mask as stored, each (L,); the mask is bool. Raises IndexError outside, StoreError for a
        file that cannot be read or holds ids that the model does not have."""
        if not 0 <= number < self.rows(sequence_length):
            raise IndexError(f"row {number} of {self.rows(sequence_length)}")
        shard = bisect_right(self._ends, number)
        place = number - (self._ends[shard] - self.info.shards[shard].documents)
        path = self.info.folder / self.info.shards[shard].name
        with _reading(path):
            inputs, mask, labels = self._file(shard, path)[DATASET][place]
        if min(inputs.min(), labels.min()) < 0 or max(inputs.max(), labels.max()) >= self._vocab_size:
            raise StoreError(
                f"{path}: row {place} holds ids outside of 0..{self._vocab_size - 1}; raise model.vocab_size if the "
                f"data need more, else {REMEDY}"
            )
        return inputs, labels, mask != 0

    def check_digests(self, on_progress: Progress | None = None) -> None:
        """Reads every row. Raises StoreError for the first that cannot be read; the data come without digests."""
        for number in range(self.info.documents):
            self.read_row(number, self._length)
            if on_progress and (number % 1000 == 0 or number + 1 == self.info.documents):
                on_progress("checking", (number + 1) * self._length, self.info.tokens)

    def _file(self, shard: int, path: Path) -> h5py.File:
        if shard not in self._files:
            if len(self._files) >= MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = _open(path)
            expected = self.info.shards[shard].documents, 3, self._length
            if file[DATASET].shape != expected:
                raise StoreError(f"{path}: {file[DATASET].shape} where it was {expected}; bring the file back")
            self._files[shard] = file
        return self._files[shard]


def _open(path: Path) -> h5py.File:
    # Unlocked: many ranks read at once, and some shared file systems refuse locks.
    file = h5py.File(path, "r", locking=False)
    data = file.get(DATASET)
    if not isinstance(data, h5py.Dataset) or data.ndim != 3 or data.shape[1] != 3 or data.dtype != np.int32:
        raise StoreError(
            f"{path}: no dataset {DATASET!r} of int32 (N, 3, L); the folder holds neither a token store (there is no "
            "store.json) nor rows as Crystal published them"
        )
    if data.shape[2] == 0:
        raise StoreError(f"{path}: rows of no tokens; {REMEDY}")
    return file


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever HDF5 stumbles over becomes one StoreError."""
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{path}: the file is missing; {REMEDY}") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise StoreError(f"{path}: damaged or cannot be read ({reason}); {REMEDY}") from error
