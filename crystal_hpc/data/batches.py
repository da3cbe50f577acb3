"""The batches of a phase, as this rank sees them: tensors of token ids, and a digest of what was really handed out.

Last stop of a token on the data side. Step t owns positions [t*B, (t+1)*B) of the phase's order; micro-batch m of
data-parallel rank r takes the positions that follow each other from t*B + (m*R + r)*b, with R ranks and micro-batches
of b. A thread reads the next step's rows while the current step computes; it is a function of the step alone, so
there is nothing to save and nothing to replay.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from crystal_hpc.data.order import PhaseOrder
from crystal_hpc.data.rows import read_rows, rows_digest
from crystal_hpc.data.store import TokenStore


@dataclass(frozen=True)
class StepBatch:
    """One data-parallel rank's share of a step."""

    rows: torch.Tensor
    """int64 (micro-batches, micro-batch, sequence_length + 1)."""
    digest: int
    """Sum over rows, modulo 2**64, of xxh3-64(row as int32, seeded with its position): adds up over ranks."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches: `tokens` and `labels`, int64 (micro-batch, sequence_length), labels one token ahead."""
        for rows in self.rows:
            yield {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


class PhaseBatches:
    """Random access to the steps of a phase for one data-parallel rank."""

    def __init__(
        self,
        order: PhaseOrder,
        stores: Mapping[str, TokenStore],
        batch_size: int,
        micro_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        self._order = order
        self._stores = [stores[name] for name in order.sources]
        self._batch_size = batch_size
        self._micro_batch = micro_batch
        share = np.arange(batch_size, dtype=np.int64).reshape(-1, data_size, micro_batch)
        self._offsets = share[:, data_rank, :]
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[StepBatch]] | None = None

    def step(self, number: int) -> StepBatch:
        """This rank's share of step `number`; starts reading the step after it."""
        ready = self._ahead
        batch = ready[1].result() if ready and ready[0] == number else self.read(number)
        self._ahead = (number + 1, self._reader.submit(self.read, number + 1))
        return batch

    def read(self, number: int) -> StepBatch:
        """The same without looking ahead."""
        positions = self._offsets + number * self._batch_size
        rows = read_rows(self._order, self._stores, positions.reshape(-1))
        return StepBatch(
            torch.from_numpy(rows.astype(np.int64)).view(*positions.shape, -1),
            rows_digest(rows, positions.reshape(-1)),
        )

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(cancel_futures=True)


def held_out_batches(
    store: TokenStore, length: int, rows: int, micro_batch: int, data_rank: int, data_size: int
) -> list[torch.Tensor]:
    """The first `rows` rows of a held-out store that fill whole micro-batches on every rank: this rank's share.

    A list of int64 (micro-batch, length + 1).
    """
    share = micro_batch * data_size
    count = min(rows, store.rows(length)) // share
    firsts = [(number * data_size + data_rank) * micro_batch for number in range(count)]
    return [
        torch.stack([torch.from_numpy(store.row(first + i, length).astype(np.int64)) for i in range(micro_batch)])
        for first in firsts
    ]
