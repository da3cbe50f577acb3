"""Which documents of a build go into which shard: the whole corpus in shuffled order, cut at every so many tokens.

Between `data/parts` and `data/merge`. Worked out once for all processes from what the parts say of their documents,
part by part, so memory does not grow with the corpus. Documents whose id was seen before are left out here, and those
whose key falls below the held-out share go into a store of their own: by hash, so that they stay held out when the
corpus grows, and equal texts fall on the same side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crystal_hpc.data.shard import Hashes, read_documents, shuffle_keys
from crystal_hpc.data.sorting import equal_runs, info_bytes

IDS_AT_A_TIME = 16_000_000  # whose hashes are held in memory together
BUCKET_BITS = 16
BUCKETS = 1 << BUCKET_BITS  # by the highest bits of the key

Key = tuple[int, int]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Division:
    """Shard k takes documents cuts[p, k]..cuts[p, k + 1] - 1 of part p, less `repeated`; the first are held out."""

    cuts: Integers
    """int64 (parts, shards + 1)."""
    held_out: int
    """Shards that belong to the held-out store."""
    repeated: Integers
    """int64 (n, 2), sorted: (part, document in it) whose id an earlier document has."""

    @property
    def shards(self) -> int:
        return int(self.cuts.shape[1]) - 1

    def repeated_in(self, part: int) -> Integers:
        """Numbers of the documents of a part that are left out."""
        start, stop = np.searchsorted(self.repeated[:, 0], [part, part + 1])
        return self.repeated[start:stop, 1]

    def save(self, path: Path) -> None:
        """Into one .npz file, under a name of the caller's."""
        with open(path, "wb") as file:
            np.savez(file, cuts=self.cuts, held_out=self.held_out, repeated=self.repeated)

    @classmethod
    def load(cls, path: Path) -> "Division":
        """The inverse of `save`."""
        with np.load(path) as found:
            return cls(found["cuts"], int(found["held_out"]), found["repeated"])


def divide(parts: Sequence[Path], seed: int, shard_tokens: int, held_out: float, look: Callable[[], None]) -> Division:
    """Divides the documents of all parts into shards. `look` is called at every part, and may raise.

    Shard k of a store begins with the document that holds token k * shard_tokens of it; a document that holds several
    such tokens leaves no empty shard behind. The held-out store takes round(held_out * BUCKETS) of the buckets.
    """
    corpus = _Corpus(parts, seed, _repeated(parts, look), look)
    weights = corpus.tokens_by_bucket()
    border = round(held_out * BUCKETS)
    outside = corpus.bounds(weights, 0, border, shard_tokens)
    inside = corpus.bounds(weights, border, BUCKETS, shard_tokens)
    cuts = [[*_places(keys, outside + inside), len(keys)] for keys, _ in corpus.read()]
    return Division(np.array(cuts, np.int64).reshape(len(parts), -1), len(outside), corpus.repeated)


class _Corpus:
    """Keys and tokens of all documents, read part by part."""

    def __init__(self, parts: Sequence[Path], seed: int, repeated: Integers, look: Callable[[], None]) -> None:
        self._parts, self._seed, self.repeated, self._look = parts, seed, repeated, look

    def read(self) -> Iterator[tuple[Hashes, Integers]]:
        """Sorted keys uint64 (n, 2) and tokens int64 (n,) of each part; documents left out have no tokens."""
        for number, path in enumerate(self._parts):
            self._look()
            documents = read_documents(path)
            tokens = np.diff(documents.offsets)
            tokens[self.repeated[self.repeated[:, 0] == number, 1]] = 0
            yield shuffle_keys(documents.hashes, self._seed), tokens

    def tokens_by_bucket(self) -> Integers:
        """Tokens of all documents by the bucket of their key, int64 (BUCKETS,)."""
        total = np.zeros(BUCKETS, np.int64)
        for keys, tokens in self.read():
            np.add.at(total, _buckets(keys), tokens)
        return total

    def bounds(self, weights: Integers, first: int, last: int, shard_tokens: int) -> list[Key]:
        """The keys at which the shards of a store begin that takes buckets first..last-1; none if it is empty."""
        after = np.cumsum(weights[first:last])
        total = int(after[-1]) if len(after) else 0
        if not total:
            return []
        targets = np.arange(shard_tokens, total, shard_tokens)
        buckets = np.searchsorted(after, targets, "right")
        keys, tokens = self._inside(first + np.unique(buckets))
        of_bucket, ends = _buckets(keys), np.cumsum(tokens)
        found = {(first << (64 - BUCKET_BITS), 0)}
        for target, bucket in zip(targets.tolist(), buckets.tolist(), strict=True):
            here = np.searchsorted(of_bucket, first + bucket)  # of the documents in the bucket, the first
            passed = int(ends[here] - tokens[here])
            before = int(after[bucket] - weights[first + bucket])
            place = np.searchsorted(ends, target - before + passed, "right")
            # The very first text of the store begins no second shard, however often it is repeated.
            if before or (keys[place] != keys[here]).any():
                found.add((int(keys[place, 0]), int(keys[place, 1])))
        return sorted(found)

    def _inside(self, buckets: Integers) -> tuple[Hashes, Integers]:
        """Keys and tokens of the documents in some buckets, sorted by key."""
        found_keys, found_tokens = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
        for keys, tokens in self.read():
            here = np.isin(_buckets(keys), buckets) & (tokens > 0)
            found_keys.append(keys[here])
            found_tokens.append(tokens[here])
        keys, tokens = np.concatenate(found_keys), np.concatenate(found_tokens)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        return keys[order], tokens[order]


def _buckets(keys: Hashes) -> Integers:
    return (keys[:, 0] >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def _places(keys: Hashes, bounds: Sequence[Key]) -> list[int]:
    """For each bound, the first of the sorted keys (n, 2) that is not below it."""
    highs = np.array([high for high, _ in bounds], np.uint64)
    places: list[int] = np.searchsorted(keys[:, 0], highs).tolist()
    for number, (high, low) in enumerate(bounds):
        while places[number] < len(keys) and (keys[places[number]].tolist()) < [high, low]:
            places[number] += 1
    return places


def _repeated(parts: Sequence[Path], look: Callable[[], None]) -> Integers:
    """(part, document) of every document with an id that another one has: all but one of them, sorted.

    The one with the smallest hash of its text stays; among equal texts, the one whose account of itself comes first.
    """
    count = sum(_documents_with_ids(path, look) for path in parts)
    passes = -(-count // IDS_AT_A_TIME)
    found = [np.empty((0, 2), np.int64)]
    for number in range(passes):
        ids, hashes, places = _with_ids_between(parts, number * (1 << 64) // passes, (number + 1) * (1 << 64) // passes)
        look()
        order = np.lexsort((hashes[:, 1], hashes[:, 0], ids[:, 1], ids[:, 0]))
        for start, stop in equal_runs(ids[order]):
            run = order[start:stop]
            keep = _first_of(run, hashes, places, parts)
            found.append(places[run[run != keep]])
    repeated = np.concatenate(found)
    return repeated[np.lexsort((repeated[:, 1], repeated[:, 0]))]


def _documents_with_ids(path: Path, look: Callable[[], None]) -> int:
    look()
    return int(read_documents(path).id_hashes.any(axis=1).sum())


def _with_ids_between(parts: Sequence[Path], low: int, high: int) -> tuple[Hashes, Hashes, Integers]:
    """Id hashes, text hashes and (part, document) of the documents whose id's hash begins with low..high-1."""
    ids, hashes, places = [], [], []
    for number, path in enumerate(parts):
        documents = read_documents(path)
        firsts = documents.id_hashes[:, 0]
        here = documents.id_hashes.any(axis=1) & (firsts >= np.uint64(low)) & (firsts <= np.uint64(high - 1))
        ids.append(documents.id_hashes[here])
        hashes.append(documents.hashes[here])
        numbers = np.flatnonzero(here)
        places.append(np.stack([np.full_like(numbers, number), numbers], axis=1))
    return np.concatenate(ids), np.concatenate(hashes), np.concatenate(places)


def _first_of(run: Integers, hashes: Hashes, places: Integers, parts: Sequence[Path]) -> int:
    """Which of the documents of one id stays; `run` is sorted by the hash of the text."""
    alike = [int(place) for place in run if (hashes[place] == hashes[run[0]]).all()]
    if len(alike) == 1:
        return alike[0]

    def info(place: int) -> bytes:
        part, document = places[place].tolist()
        return info_bytes(read_documents(parts[part], document, document + 1), 0)

    return min(alike, key=info)
