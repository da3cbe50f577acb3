"""Which row stands at which position of a phase: a function, not a list.

Between the stores and the batches in the flow of a token. `PhaseOrder.samples(p)` gives (source, epoch, row) of any
position in O(1) memory and time, without index files and without replaying what came before. It knows nothing of
ranks: step t of a phase owns positions [t*B, (t+1)*B), however many ranks share them. So a resume lands on the exact
sample, a changed layout sees the same batches, a longer phase only adds positions, and what each source has given is
arithmetic (`consumed`), which anyone can recompute from the config and the sizes of the stores.

How. Positions come in blocks. With cumulative weights W_k, the first n samples hold floor(W_k n) - floor(W_{k-1} n) of
source k, for every n that ends a block: within one of weight * n, always. So a block is a row of slots of which each
source owns a stretch, and `deal` decides which position gets which slot: evenly at every scale, random in detail, and
with a closed form for how many of each source came before. The j-th sample of a source, in order of position, is row
P(j mod rows) of epoch j div rows, where P is a keyed permutation: each epoch visits every row once, in an order of its
own. Sources go on where earlier phases left them, in the middle of an epoch too.

The way back, from a row to the positions that read it (`positions`), is as direct: P is inverted for each epoch, and
the position of the j-th sample of a source is found by bisection, as its count never falls.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.data.catalog import rows
from crystal_hpc.data.permutation import ROUNDS, mix, permute_each, round_keys, unpermute

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

MIN_BLOCK = 64


@dataclass(frozen=True)
class PhaseOrder:
    """The order of one phase. Sources of weight zero are left out."""

    seed: int
    phase: str
    sequence_length: int
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    """Rows of `sequence_length` tokens that each source has."""
    cumulative: tuple[Fraction, ...]
    """W_k: exact sums of the normalised weights up to and with source k; the last is 1."""
    start: tuple[int, ...]
    """Samples that earlier phases took from each source."""
    block: int
    """Positions in a block: a power of two, large enough that each weight times it is at least one."""

    def samples(self, positions: "Ints") -> "tuple[Ints, Ints, Ints]":
        """For int64 positions (n,): index into `sources`, epoch, and row within the source, each int64 (n,)."""
        import numpy as np  # here, because `crystal plan` must start without it

        numbers, which = np.unique(positions // self.block, return_inverse=True)
        shape = -1, len(self.sources)
        counts = np.array([self._counts(number) for number in numbers.tolist()], dtype=np.int64).reshape(shape)[which]
        ends = np.array([self._edges(number)[1:] for number in numbers.tolist()], dtype=np.uint64).reshape(shape)[which]
        slot, below = deal(positions.astype(np.uint64)[:, None], ends, self.block, self._deal_key)
        source = (ends <= slot).sum(axis=1)
        inside = np.diff(below.astype(np.int64), axis=1, prepend=0)
        taken = np.array(self.start, dtype=np.int64) + counts + inside
        ordinal = np.take_along_axis(taken, source[:, None], axis=1)[:, 0]
        count = np.array(self.rows, dtype=np.int64)[source]
        epoch = ordinal // count
        return source, epoch, permute_each(ordinal % count, count, self._keys(source, epoch))

    def consumed(self, samples: int) -> dict[str, int]:
        """How many of the phase's first `samples` samples come from each source."""
        number, key = samples // self.block, self._deal_key
        below = [deal(samples, edge, self.block, key)[1] for edge in self._edges(number)]
        inside = [high - low for low, high in pairwise(below)]
        counts = self._counts(number)
        return {name: counts[k] + inside[k] for k, name in enumerate(self.sources)}

    def positions(self, source: str, row: int, samples: int) -> list[tuple[int, int]]:
        """Every (position, epoch) among the phase's first `samples` samples that reads this row, in order.

        The inverse of `samples`; empty for a source that the phase leaves out. Takes O(log samples) for each epoch.
        """
        if source not in self.sources:
            return []
        k = self.sources.index(source)
        count, first = self.rows[k], self.start[k]
        assert 0 <= row < count, (source, row, count)
        last = first + self._given(k, samples)
        found = []
        for epoch in range(first // count, -(-last // count)):
            ordinal = epoch * count + unpermute(row, count, self._row_keys(k, epoch))
            if first <= ordinal < last:
                found.append((self._position(k, ordinal - first, samples), epoch))
        return found

    def first_repeat(self, source: str, samples: int) -> int | None:
        """The first position that gives a row of the source again; None if none of the first `samples` does.

        Again: after this phase, or an earlier one of the same sequence length, has given it. As every row comes once
        before any comes twice, this is where the second epoch begins.
        """
        if source not in self.sources:
            return None
        k = self.sources.index(source)
        fresh = max(0, self.rows[k] - self.start[k])
        return self._position(k, fresh, samples) if fresh < self._given(k, samples) else None

    def _given(self, k: int, samples: int) -> int:
        """How many of the first `samples` samples come from source k: `consumed` for one source."""
        number = samples // self.block
        low, high = (deal(samples, edge, self.block, self._deal_key)[1] for edge in self._edges(number)[k : k + 2])
        return self._counts(number)[k] + int(high - low)

    def _position(self, k: int, index: int, samples: int) -> int:
        """The position of sample number `index` of source k, which is among the first `samples` positions."""
        number = bisect_right(range(samples // self.block + 1), index, key=lambda number: self._counts(number)[k]) - 1
        inside = range(number * self.block, (number + 1) * self.block)
        return inside[bisect_right(inside, index, key=lambda position: self._given(k, position)) - 1]

    @property
    def _deal_key(self) -> int:
        return round_keys(f"{self.seed}|{self.phase}|deal")[0]

    def _floors(self, number: int) -> list[int]:
        """floor(W_k n) for the n positions before block `number`, led by zero."""
        n = number * self.block
        return [0, *(n * w.numerator // w.denominator for w in self.cumulative)]

    def _counts(self, number: int) -> list[int]:
        """Samples of each source before block `number`."""
        return [high - low for low, high in pairwise(self._floors(number))]

    def _edges(self, number: int) -> list[int]:
        """Slots [edges[k], edges[k+1]) of the block belong to source k."""
        return [after - before for before, after in zip(self._floors(number), self._floors(number + 1), strict=True)]

    def _keys(self, source: "Ints", epoch: "Ints") -> "npt.NDArray[np.uint64]":
        """The keys of each one's permutation, (rounds, n)."""
        import numpy as np

        pairs, which = np.unique(epoch * len(self.sources) + source, return_inverse=True)
        several = [self._row_keys(pair % len(self.sources), pair // len(self.sources)) for pair in pairs.tolist()]
        return np.array(several, dtype=np.uint64).reshape(-1, ROUNDS).T[:, which]

    def _row_keys(self, k: int, epoch: int) -> list[int]:
        """Keys of the epoch's permutation. The phase has no part in them: an epoch that spans two keeps its order."""
        return round_keys(f"{self.seed}|rows|{self.sources[k]}|{self.sequence_length}|{epoch}")


def run_orders(run: Run, tokens: Mapping[str, int]) -> list[PhaseOrder]:
    """The order of every phase of a run, given the tokens in each source's store.

    A phase continues its sources where the phases before it, of the same sequence length, left them; nothing in a
    phase depends on a later one.
    """
    taken: dict[tuple[str, int], int] = {}
    orders = []
    for phase in run.phases:
        length = phase.sequence_length
        weights = {name: Fraction(str(weight)) for name, weight in phase.mixture.items() if weight > 0}
        total, sums = sum(weights.values()), Fraction(0)
        cumulative = tuple((sums := sums + weight) / total for weight in weights.values())
        order = PhaseOrder(
            seed=run.seed,
            phase=phase.name,
            sequence_length=length,
            sources=tuple(weights),
            rows=tuple(rows(tokens[name], length) for name in weights),
            cumulative=cumulative,
            start=tuple(taken.get((name, length), 0) for name in weights),
            block=_block_size(min(weights.values()) / total),
        )
        for name, count in order.consumed(derive.phase_samples(phase)).items():
            taken[name, length] = taken.get((name, length), 0) + count
        orders.append(order)
    return orders


def _block_size(smallest: Fraction) -> int:
    block = MIN_BLOCK
    while smallest * block < 1:
        block *= 2
    return block


def deal(position: Any, edge: Any, block: int, key: int) -> tuple[Any, Any]:
    """The slot of a position in its block, and how many earlier positions of the block have a slot below `edge`.

    Bit i of the position, counted from below, decides bit i of the slot, counted from above; a coin keyed by the higher
    bits of the position says whether it is flipped. So each aligned stretch of 2^i positions gets slots that are evenly
    spaced over the block, and counting those below an edge is one division for each set bit of the position. Takes
    ints, or uint64 arrays that broadcast together.
    """
    levels = block.bit_length() - 1
    slot, below = position & 0, (position | edge) & 0
    for level in reversed(range(levels)):
        spacing = levels - level
        bit = (position >> level) & 1
        coin = mix(((position >> level) | 1) << level, key) >> 63
        # Where the bit is set, the stretch beside this one comes before it, and has these low bits of slots:
        other = slot | ((bit ^ coin ^ 1) << (spacing - 1))
        slot = slot | ((bit ^ coin) << (spacing - 1))
        below = below + bit * ((edge + (1 << spacing) - 1 - other) >> spacing)
    return slot, below
