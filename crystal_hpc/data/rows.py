"""The rows at given positions of a phase, and a digest by which anyone can prove that they were the right ones.

Between `order` and `batches`; `report.ledger` makes the same digests again from the plan.
"""

import numpy as np
import numpy.typing as npt
import xxhash

from crystal_hpc.data.order import PhaseOrder
from crystal_hpc.data.store import TokenStore


def read_rows(order: PhaseOrder, stores: list[TokenStore], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The rows at these positions (n,): int32 (n, sequence_length + 1)."""
    source, _, row = order.samples(positions)
    length = order.sequence_length
    return np.stack(
        [stores[s].row(r, length).astype(np.int32) for s, r in zip(source.tolist(), row.tolist(), strict=True)]
    )


def rows_digest(rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int64]) -> int:
    """Sum over int32 rows (n, length), modulo 2**64, of xxh3-64(row, seeded with its position).

    Sums over the ranks that share a step to the digest of the whole step."""
    return sum(
        xxhash.xxh3_64_intdigest(row.tobytes(), seed=position)
        for row, position in zip(rows, positions.tolist(), strict=True)
    ) % (2**64)
