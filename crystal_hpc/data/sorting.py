"""Documents and their tokens brought into shuffled order, and put together from several places.

Under `data/parts` (one part of a corpus) and `data/merge` (one shard of a store): both end with `in_order`. Documents
are sorted by shuffle key, equal texts by what else is said of them, so the result depends on the documents alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from crystal_hpc.data.shard import Documents, Hashes, Offsets, Tokens, shuffle_keys


def in_order(documents: Documents, tokens: Tokens, seed: int) -> tuple[Documents, Tokens]:
    """The same documents sorted by shuffle key; their offsets count from 0, wherever those given began."""
    return _picked(documents, tokens, _order(documents, seed))


def _picked(documents: Documents, tokens: Tokens, order: npt.NDArray[np.int64]) -> tuple[Documents, Tokens]:
    """The documents with these numbers, in this order; offsets of what is given may begin anywhere."""
    return (
        Documents(
            offsets=_ends(np.diff(documents.offsets)[order]),
            hashes=documents.hashes[order],
            id_hashes=documents.id_hashes[order],
            info_offsets=_ends(np.diff(documents.info_offsets)[order]),
            info=_rearranged(documents.info, documents.info_offsets, order),
        ),
        _rearranged(tokens, documents.offsets, order),
    )


def joined(pieces: Sequence[Documents]) -> Documents:
    """The documents of all pieces, one after another; offsets count from 0, wherever those of the pieces began."""
    return Documents(
        offsets=_ends(np.concatenate([np.diff(piece.offsets) for piece in pieces])),
        hashes=np.concatenate([piece.hashes for piece in pieces]),
        id_hashes=np.concatenate([piece.id_hashes for piece in pieces]),
        info_offsets=_ends(np.concatenate([np.diff(piece.info_offsets) for piece in pieces])),
        info=np.concatenate([piece.info for piece in pieces]),
    )


def _order(documents: Documents, seed: int) -> npt.NDArray[np.int64]:
    keys = shuffle_keys(documents.hashes, seed)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    for start, stop in equal_runs(keys[order]):
        run = order[start:stop].tolist()
        order[start:stop] = sorted(run, key=lambda place: info_bytes(documents, place))
    return order


def equal_runs(keys: Hashes) -> list[tuple[int, int]]:
    """Start and stop of every stretch of two or more equal rows of a sorted (n, k) array."""
    same = (keys[1:] == keys[:-1]).all(axis=1).astype(np.int8)
    steps = np.diff(same, prepend=np.int8(0), append=np.int8(0))
    return list(zip(np.flatnonzero(steps == 1).tolist(), (np.flatnonzero(steps == -1) + 1).tolist(), strict=True))


def info_bytes(documents: Documents, place: int) -> bytes:
    """What is said of one document, as JSON."""
    start, stop = (documents.info_offsets[place : place + 2] - documents.info_offsets[0]).tolist()
    return documents.info[start:stop].tobytes()


def _ends(lengths: npt.NDArray[np.int64]) -> Offsets:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _rearranged(values: npt.NDArray[np.generic], offsets: Offsets, order: npt.NDArray[np.int64]) -> Any:
    """The stretches values[offsets[i]:offsets[i + 1]] in another order."""
    stretches = list(pairwise((offsets - offsets[0]).tolist()))
    return np.concatenate([values[:0], *(values[slice(*stretches[place])] for place in order.tolist())])


def without(documents: Documents, tokens: Tokens, left_out: npt.NDArray[np.int64]) -> tuple[Documents, Tokens]:
    """The documents but for those with the numbers `left_out`, and their tokens."""
    kept = np.setdiff1d(np.arange(len(documents)), left_out)
    return _picked(documents, tokens, kept)
