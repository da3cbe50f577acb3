"""What the shards of a store hold, counted shard by shard; `data/audit` judges it."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crystal_hpc.data.shard import Documents, shuffle_keys
from crystal_hpc.data.sorting import equal_runs
from crystal_hpc.data.store import TokenStore

MOST_NAMED = 1000  # faulty documents whose numbers are kept
MOST_REPEATED = 3


@dataclass
class Scan:
    """Counts over the shards that were scanned, in order."""

    vocab_size: int
    documents: int = 0
    tokens: int = 0
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """How often each id occurs."""
    without_bos: list[int] = field(default_factory=list)
    without_eos: list[int] = field(default_factory=list)
    out_of_order: list[int] = field(default_factory=list)
    copies: int = 0
    """Documents whose text the one before has."""
    copied_tokens: int = 0
    most_repeated: list[tuple[int, int]] = field(default_factory=list)
    """(how often, number of the first) of the texts that occur most often."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Documents by the power of two at or below their number of tokens."""
    longest: tuple[int, int] = (0, 0)
    """(tokens, number) of the longest document."""
    last: tuple[tuple[int, int], int, int] | None = None
    """Key of the last document, where its run of equal texts began, and how long that is so far."""

    def count(self, token: int) -> int:
        """How often an id occurs."""
        return int(self.ids[token]) if token < len(self.ids) else 0

    @property
    def max_token(self) -> int:
        """The largest id that occurs; -1 where there is none."""
        return int(np.flatnonzero(self.ids)[-1]) if self.ids.any() else -1


def scan_shard(store: TokenStore, number: int, scan: Scan) -> None:
    """Adds a shard to the counts. Raises StoreError for a damaged one."""
    documents, shard = store.documents(number), store.info.shards[number]
    before = sum(earlier.documents for earlier in store.info.shards[:number])
    start = sum(earlier.tokens for earlier in store.info.shards[:number])
    tokens = store.read(start, shard.tokens)
    found = np.bincount(tokens)
    size = max(len(found), len(scan.ids))
    scan.ids = np.pad(scan.ids, (0, size - len(scan.ids))) + np.pad(found, (0, size - len(found)))
    for expected, places, faulty in (
        (store.info.bos, documents.offsets[:-1], scan.without_bos),
        (store.info.eos, documents.offsets[1:] - 1, scan.without_eos),
    ):
        if expected is not None:
            faulty += (before + np.flatnonzero(tokens[places] != expected)).tolist()
    _count_lengths(documents, before, scan)
    _follow_order(documents, before, store.info.seed, scan)
    scan.documents += len(documents)
    scan.tokens += int(documents.offsets[-1])


def _count_lengths(documents: Documents, before: int, scan: Scan) -> None:
    lengths = np.diff(documents.offsets)
    powers, counts = np.unique(np.log2(np.maximum(lengths, 1)).astype(np.int64), return_counts=True)
    for power, count in zip(powers.tolist(), counts.tolist(), strict=True):
        scan.lengths[power] = scan.lengths.get(power, 0) + count
    place = int(np.argmax(lengths))
    scan.longest = max(scan.longest, (int(lengths[place]), before + place))


def _follow_order(documents: Documents, before: int, seed: int, scan: Scan) -> None:
    """Whether keys go up, and which texts are repeated; a run of equal texts may go on from the shard before."""
    keys = shuffle_keys(documents.hashes, seed)
    high, low = keys[:, 0], keys[:, 1]
    down = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
    if scan.last and (int(high[0]), int(low[0])) < scan.last[0]:
        scan.out_of_order.append(before - 1)
    scan.out_of_order += (before + np.flatnonzero(down)).tolist()
    lengths = np.diff(documents.offsets)
    again = (keys[1:] == keys[:-1]).all(axis=1)
    scan.copies += int(again.sum())
    scan.copied_tokens += int(lengths[1:][again].sum())
    runs = [(stop - start, before + start) for start, stop in equal_runs(keys)]
    if scan.last and (int(high[0]), int(low[0])) == scan.last[0]:
        scan.copies += 1
        scan.copied_tokens += int(lengths[0])
        here = runs.pop(0)[0] if runs and runs[0][1] == before else 1
        runs.insert(0, (scan.last[2] + here, scan.last[1]))
        scan.most_repeated = [run for run in scan.most_repeated if run[1] != scan.last[1]]
    scan.most_repeated = sorted([*scan.most_repeated, *runs], key=lambda run: (-run[0], run[1]))[:MOST_REPEATED]
    whole = next((run for run in runs if run[1] + run[0] == before + len(keys)), (1, before + len(keys) - 1))
    scan.last = ((int(high[-1]), int(low[-1])), whole[1], whole[0])
