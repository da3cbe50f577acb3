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

from crystal_hpc.data.fim import PhaseFim
from crystal_hpc.data.order import PhaseOrder
from crystal_hpc.data.preparing import PreparedRows
from crystal_hpc.data.rows import Rows, RowSource, gather, read_rows, rows_digest
from crystal_hpc.data.slices import Share


@dataclass(frozen=True)
class StepBatch:
    """One data-parallel rank's share of a step."""

    tokens: torch.Tensor
    """int64 (micro-batches, micro-batch, sequence_length)."""
    labels: torch.Tensor
    """The same shape: what each token is to be followed by."""
    loss_mask: torch.Tensor | None = None
    """bool, the same shape: which labels count; None if all do."""
    digest: int = 0
    """Sum over rows, modulo 2**64, of their digests (`data.rows`): adds up over ranks."""

    @classmethod
    def of(cls, rows: Rows, micro_batch: int, digest: int = 0) -> "StepBatch":
        """Rows that follow each other, in micro-batches."""
        shape = -1, micro_batch, rows.inputs.shape[1]
        tokens, labels = (torch.from_numpy(ids.astype(np.int64)).view(shape) for ids in (rows.inputs, rows.labels))
        return cls(tokens, labels, None if rows.mask is None else torch.from_numpy(rows.mask).view(shape), digest)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches: `tokens` and `labels`, and `loss_mask` where there is one, (micro-batch, sequence_length)."""
        for number in range(len(self.tokens)):
            micro_batch = {"tokens": self.tokens[number], "labels": self.labels[number]}
            yield micro_batch if self.loss_mask is None else micro_batch | {"loss_mask": self.loss_mask[number]}


class PhaseBatches:
    """Random access to the steps of a phase for one data-parallel rank."""

    def __init__(
        self,
        order: PhaseOrder,
        sources: Mapping[str, RowSource],
        batch_size: int,
        micro_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
        fim: PhaseFim | None = None,
        prepared: PreparedRows | None = None,
    ) -> None:
        """`prepared` may have rows of some steps on the node's own disk, and is closed with this."""
        self._order = order
        self._sources = [sources[name] for name in order.sources]
        self._share = Share(batch_size, micro_batch, data_rank, data_size)
        self._fim = fim
        self._prepared = prepared
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
        positions = self._share.positions(number)
        rows = self._prepared.read(number) if self._prepared else None
        if rows is None:
            rows = read_rows(self._order, self._sources, positions, self._fim)
        return StepBatch.of(rows, self._share.micro_batch, rows_digest(rows, positions))

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(cancel_futures=True)
        if self._prepared:
            self._prepared.close()


def held_out_batches(
    source: RowSource, length: int, rows: int, micro_batch: int, data_rank: int, data_size: int
) -> list[StepBatch]:
    """The first `rows` rows of a held-out source that fill whole micro-batches on every rank: this rank's share.

    A list of batches of one micro-batch each. FIM has no part in evaluation.
    """
    share = micro_batch * data_size
    count = min(rows, source.rows(length)) // share
    firsts = [(number * data_size + data_rank) * micro_batch for number in range(count)]
    return [
        StepBatch.of(
            gather((source.read_row(first + i, length) for i in range(micro_batch)), (micro_batch, length)), micro_batch
        )
        for first in firsts
    ]
