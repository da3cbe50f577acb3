"""The rows at given positions of a phase, and a digest by which anyone can prove that they were the right ones.

Between `order` and `batches`; `report.ledger` makes the same digests again from the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from crystal_hpc.data.catalog import StoreInfo
from crystal_hpc.data.fim import PhaseFim, Place

if TYPE_CHECKING:
    from crystal_hpc.data.order import PhaseOrder

Row = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Rows:
    """What training reads."""

    inputs: npt.NDArray[np.int32]
    """(n, sequence_length)"""
    labels: npt.NDArray[np.int32]
    """(n, sequence_length): what each input is to be followed by."""
    mask: npt.NDArray[np.bool_] | None = None
    """(n, sequence_length): which labels count; None if all do."""


class RowSource(Protocol):
    """Where rows come from: a token store (`data.store`), or rows as Crystal published them (`data.published`)."""

    info: StoreInfo

    def rows(self, sequence_length: int) -> int:
        """How many rows of this length it has."""

    def read_row(self, number: int, sequence_length: int) -> Row:
        """Inputs and labels, integers (sequence_length,) each, and bool (sequence_length,) which labels count, or None
        if all do. Raises IndexError, and StoreError where the files are damaged."""


def read_rows(
    order: "PhaseOrder", sources: Sequence[RowSource], positions: npt.NDArray[np.int64], fim: PhaseFim | None = None
) -> Rows:
    """The rows at these positions (n,); `sources` in the order's order. Raises StoreError for damaged files."""
    source, epoch, row = order.samples(positions)
    rows = gather(
        (sources[s].read_row(r, order.sequence_length) for s, r in zip(source.tolist(), row.tolist(), strict=True)),
        (len(positions), order.sequence_length),
    )
    if fim is None:
        return rows
    places = [
        Place(order.sources[s], e, r) for s, e, r in zip(source.tolist(), epoch.tolist(), row.tolist(), strict=True)
    ]
    return _rewrite(rows, places, fim)


def gather(found: Any, shape: tuple[int, int]) -> Rows:
    """Puts rows (an iterable of what RowSource.read_row returns) together; shape: how many, and how long."""
    inputs, labels, mask = np.empty(shape, np.int32), np.empty(shape, np.int32), np.ones(shape, bool)
    for number, (ids, following, counts) in enumerate(found):
        inputs[number], labels[number] = ids, following
        if counts is not None:
            mask[number] = counts
    return Rows(inputs, labels, None if mask.all() else mask)


def _rewrite(rows: Rows, places: list[Place], fim: PhaseFim) -> Rows:
    """The rows with FIM in those whose source has it."""
    chosen = [number for number, place in enumerate(places) if place.source in fim.by_source]
    if not chosen:
        return rows
    inputs, labels = rows.inputs, rows.labels
    mask = np.ones(inputs.shape, bool) if rows.mask is None else rows.mask
    whole = np.concatenate([inputs[chosen], labels[chosen, -1:]], axis=1)
    done, mask[chosen] = fim.rewrite(whole, [places[number] for number in chosen])
    inputs[chosen], labels[chosen] = done[:, :-1], done[:, 1:]
    return Rows(inputs, labels, None if mask.all() else mask)


def rows_digest(rows: Rows, positions: npt.NDArray[np.int64]) -> int:
    """Sum over the rows, modulo 2**64, of xxh3-64(row, seeded with its position).

    Of a plain row, its inputs and last label as int32 (sequence_length + 1,). If its labels are other than the inputs
    one ahead, or some do not count, then its labels (int32) and mask (a byte each) as well. Sums over the ranks that
    share a step to the digest of the whole step."""
    whole = np.concatenate([rows.inputs, rows.labels[:, -1:]], axis=1)
    plain = (rows.inputs[:, 1:] == rows.labels[:, :-1]).all(axis=1)
    mask = np.ones(rows.inputs.shape, bool) if rows.mask is None else rows.mask
    plain &= mask.all(axis=1)
    total = 0
    for number, position in enumerate(positions.tolist()):
        digest = xxhash.xxh3_64(whole[number].tobytes(), seed=position)
        if not plain[number]:
            digest.update(rows.labels[number].tobytes() + mask[number].tobytes())
        total += digest.intdigest()
    return total % 2**64
