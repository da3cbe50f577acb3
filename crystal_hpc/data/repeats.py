"""Which documents are more than once in a store, or in several: by hash, in passes that fit into memory.

Under `data/audit`. The hashes of a pass are those that begin with a certain range of values, so equal ones meet
whatever the seeds by which the stores were shuffled.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from crystal_hpc.data.shard import Hashes
from crystal_hpc.data.store import TokenStore
from crystal_hpc.progress import Progress

AT_A_TIME = 16_000_000  # documents whose hashes are held in memory together
MOST_STORES = 63  # one bit each

Ids = npt.NDArray[np.int64]


def repeated_ids(store: TokenStore) -> int:
    """How many documents have an id that another one has, counted without the first of each."""
    again = 0
    for hashes, _ in _passes([store], "id_hashes", None):
        hashes = _sorted(hashes[hashes.any(axis=1)])
        again += int((hashes[1:] == hashes[:-1]).all(axis=1).sum())
    return again


def shared_documents(stores: Sequence[TokenStore], on_progress: Progress | None = None) -> dict[tuple[int, int], int]:
    """For each pair of stores, by their numbers, how many different texts are in both."""
    assert len(stores) <= MOST_STORES
    shared = dict.fromkeys(combinations(range(len(stores)), 2), 0)
    for hashes, numbers in _passes(stores, "hashes", on_progress):
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        hashes, bits = hashes[order], np.left_shift(1, numbers[order])
        starts = np.flatnonzero(np.concatenate([[True], (hashes[1:] != hashes[:-1]).any(axis=1)]))
        masks, counts = np.unique(np.bitwise_or.reduceat(bits, starts), return_counts=True)
        for mask, count in zip(masks.tolist(), counts.tolist(), strict=True):
            for one, other in shared:
                if mask >> one & mask >> other & 1:
                    shared[one, other] += count
    return shared


def _passes(stores: Sequence[TokenStore], column: str, on_progress: Progress | None) -> Iterator[tuple[Hashes, Ids]]:
    """Hashes uint64 (n, 2) of the documents of all stores, and whose each is; every value in one pass alone."""
    documents = sum(store.info.documents for store in stores)
    passes = -(-documents // AT_A_TIME)
    for number in range(passes):
        low, high = number * (1 << 64) // passes, (number + 1) * (1 << 64) // passes - 1
        found, whose = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
        for place, store in enumerate(stores):
            for shard in range(len(store.info.shards)):
                hashes = getattr(store.documents(shard), column)
                inside = hashes[(hashes[:, 0] >= np.uint64(low)) & (hashes[:, 0] <= np.uint64(high))]
                found.append(inside)
                whose.append(np.full(len(inside), place, np.int64))
        if on_progress:
            on_progress("comparing documents", number + 1, passes)
        if sum(map(len, found)):
            yield np.concatenate(found), np.concatenate(whose)


def _sorted(hashes: Hashes) -> Hashes:
    return hashes[np.lexsort((hashes[:, 1], hashes[:, 0]))]
