"""What the shards of a store hold, counted shard by shard; `data/audit` judges it."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crystal_hpc.data.shard import REMEDY, Documents, shuffle_keys
from crystal_hpc.data.sorting import equal_runs
from crystal_hpc.data.store import TokenStore
from crystal_hpc.errors import StoreError

MOST_REPEATED = 3
PIECE = 1 << 24  # tokens counted at a time


@dataclass
class Faults:
    """Documents with something wrong: how many, and the first of them."""

    count: int = 0
    first: int = -1

    def add(self, documents: npt.NDArray[np.int64]) -> None:
        """Counts more, in order of their numbers."""
        if len(documents) and not self.count:
            self.first = int(documents[0])
        self.count += len(documents)


@dataclass
class Scan:
    """Counts over the shards that were scanned, in order."""

    vocab_size: int
    documents: int = 0
    tokens: int = 0
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """How often each id below `vocab_size` occurs; the last element counts all others."""
    max_token: int = -1
    """The largest id that occurs; -1 where there is none."""
    without_bos: Faults = field(default_factory=Faults)
    without_eos: Faults = field(default_factory=Faults)
    out_of_order: Faults = field(default_factory=Faults)
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
        return int(self.ids[token]) if token < min(len(self.ids), self.vocab_size) else 0


def scan_shard(store: TokenStore, number: int, scan: Scan) -> None:
    """Adds a shard to the counts. Raises StoreError for a damaged one."""
    documents, shard = store.documents(number), store.info.shards[number]
    before = sum(earlier.documents for earlier in store.info.shards[:number])
    start = sum(earlier.tokens for earlier in store.info.shards[:number])
    tokens = store.read(start, shard.tokens)
    offsets = documents.offsets
    if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) < 0).any():
        raise StoreError(f"{store.path(number)}: its documents do not add up to its tokens; {REMEDY}")
    scan.ids = np.zeros(scan.vocab_size + 1, np.int64) if not len(scan.ids) else scan.ids
    for begin in range(0, len(tokens), PIECE):
        piece = tokens[begin : begin + PIECE]
        scan.max_token = max(scan.max_token, int(piece.max()))
        scan.ids += np.bincount(np.minimum(piece.astype(np.int64), scan.vocab_size), minlength=scan.vocab_size + 1)
    for expected, places, faulty in (
        (store.info.bos, documents.offsets[:-1], scan.without_bos),
        (store.info.eos, documents.offsets[1:] - 1, scan.without_eos),
    ):
        if expected is not None:
            faulty.add(before + np.flatnonzero(tokens[places] != expected))
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
        scan.out_of_order.add(np.array([before - 1]))
    scan.out_of_order.add(before + np.flatnonzero(down))
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
