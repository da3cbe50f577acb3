"""The second half of a build: the stretch of every part that belongs to a shard is read, sorted, and written.

Between `data/division` and the store. A part is sorted by the same key as the store, so its share of a shard is one
stretch of documents and one of tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from crystal_hpc.data.catalog import ShardInfo
from crystal_hpc.data.division import Division, Integers
from crystal_hpc.data.shard import Documents, Tokens, damaged, opened, read_documents, write_shard
from crystal_hpc.data.sorting import in_order, joined, without


def merge_shard(
    path: Path,
    number: int,
    parts: Sequence[Path],
    division: Division,
    seed: int,
    attributes: Mapping[str, int | str],
) -> ShardInfo:
    """Writes shard `number` of a division to `path`. Raises StoreError for a damaged part, DiskError."""
    pieces = []
    for part, source in enumerate(parts):
        start, stop = division.cuts[part, number : number + 2].tolist()
        if start < stop:
            pieces.append(_stretch(source, start, stop, division.repeated_in(part)))
    documents = joined([documents for documents, _ in pieces])
    tokens = np.concatenate([tokens for _, tokens in pieces])
    return write_shard(path, *in_order(documents, tokens, seed), attributes)


def _stretch(path: Path, start: int, stop: int, repeated: Integers) -> tuple[Documents, Tokens]:
    """Documents start..stop-1 of a part, less the repeated ones, with their tokens."""
    documents = read_documents(path, start, stop)
    with opened(path) as file:
        tokens: Tokens = file["tokens"][documents.offsets[0] : documents.offsets[-1]]
    if len(tokens) != documents.offsets[-1] - documents.offsets[0]:
        raise damaged(path, ValueError("tokens are missing"))
    inside = repeated[(repeated >= start) & (repeated < stop)] - start
    return without(documents, tokens, inside) if len(inside) else (documents, tokens)
