"""Batches: the rows that the order names, shared out among ranks, the same with or without reading ahead."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from crystal_hpc.config.schema import Run
from crystal_hpc.data.batches import PhaseBatches, StepBatch, held_out_batches
from crystal_hpc.data.build import build_store
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.store import TokenStore

LENGTH, BATCH = 16, 24
Open = Callable[..., PhaseBatches]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> dict[str, TokenStore]:
    folder = tmp_path_factory.mktemp("stores")
    for seed, name in enumerate(["a", "b"]):
        build_store([corpus], folder / name, tokenizer_folder, seed=seed)
    return {name: TokenStore.open(folder / name) for name in ("a", "b")}


@pytest.fixture(scope="module")
def order(stores: dict[str, TokenStore]) -> PhaseOrder:
    phase = {
        "name": "p",
        "sequence_length": LENGTH,
        "batch_size": BATCH,
        "steps": 100,
        "mixture": {"a": 0.7, "b": 0.3},
        "learning_rate": {"peak": 0.1},
    }
    run = Run.model_validate(
        {
            "name": "r",
            "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 534},
            "data": {"tokenizer": "t", "sources": {"a": "a", "b": "b"}},
            "phases": [phase],
        }
    )
    return run_orders(run, {name: store.tokens for name, store in stores.items()})[0]


@pytest.fixture
def open_batches(stores: dict[str, TokenStore], order: PhaseOrder) -> Iterator[Open]:
    """Opens a rank's batches: open_batches(micro_batch, rank, size)."""
    opened: list[PhaseBatches] = []

    def start(micro_batch: int = 2, rank: int = 0, size: int = 1) -> PhaseBatches:
        opened.append(PhaseBatches(order, stores, BATCH, micro_batch, rank, size))
        return opened[-1]

    yield start
    for batches in opened:
        batches.close()


def whole(batch: StepBatch) -> torch.Tensor:
    """The rows of a batch, inputs and last label: (micro-batches, micro-batch, LENGTH + 1)."""
    return torch.cat([batch.tokens, batch.labels[..., -1:]], dim=-1)


def row_at(position: int, order: PhaseOrder, stores: dict[str, TokenStore]) -> list[int]:
    source, _, row = (int(column[0]) for column in order.samples(np.array([position])))
    tokens: list[int] = stores[order.sources[source]].row(row, LENGTH).tolist()
    return tokens


def test_a_micro_batch_holds_the_positions_that_the_formula_gives(
    open_batches: Open, order: PhaseOrder, stores: dict[str, TokenStore]
) -> None:
    micro_batch, size, step = 2, 3, 5
    for rank in range(size):
        rows = whole(open_batches(micro_batch, rank, size).read(step))
        assert rows.shape == (BATCH // (micro_batch * size), micro_batch, LENGTH + 1)
        assert rows.dtype == torch.int64
        for m, rows_of_micro_batch in enumerate(rows.tolist()):
            begin = step * BATCH + (m * size + rank) * micro_batch
            assert rows_of_micro_batch == [row_at(begin + i, order, stores) for i in range(micro_batch)]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_step_holds_the_same_rows_whatever_the_ranks(open_batches: Open, micro_batch: int, size: int) -> None:
    for step in (0, 3, 77):
        expected = open_batches(BATCH).read(step)
        shares = [open_batches(micro_batch, rank, size).read(step) for rank in range(size)]
        together = torch.stack([whole(share) for share in shares], dim=1).reshape(BATCH, -1)
        assert torch.equal(together, whole(expected)[0])
        assert sum(share.digest for share in shares) % 2**64 == expected.digest


def test_reading_ahead_changes_nothing(open_batches: Open) -> None:
    ahead, plain = open_batches(), open_batches()
    for number in [0, 1, 2, 3, 3, 9, 10, 0, 1, 99, 100]:
        one, other = ahead.step(number), plain.read(number)
        assert torch.equal(whole(one), whole(other))
        assert one.digest == other.digest


def test_closing_ends_the_reading_thread(stores: dict[str, TokenStore], order: PhaseOrder) -> None:
    before = threading.active_count()
    batches = PhaseBatches(order, stores, BATCH, 2)
    batches.step(0)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_labels_are_tokens_one_ahead(open_batches: Open) -> None:
    batch = open_batches().read(1)
    micro_batches = list(batch)
    assert len(micro_batches) == len(batch.tokens) == BATCH // 2
    for rows, micro_batch in zip(whole(batch), micro_batches, strict=True):
        assert micro_batch.keys() == {"tokens", "labels"}
        tokens, labels = micro_batch["tokens"], micro_batch["labels"]
        assert tokens.shape == labels.shape == (2, LENGTH)
        assert torch.equal(labels[:, :-1], tokens[:, 1:])
        assert torch.equal(torch.cat([tokens, labels[:, -1:]], dim=1), rows)
        assert tokens.is_contiguous() and labels.is_contiguous()


def test_a_digest_is_that_of_the_rows_at_their_positions(
    open_batches: Open, order: PhaseOrder, stores: dict[str, TokenStore]
) -> None:
    step = 4
    expected = sum(
        xxhash.xxh3_64_intdigest(np.array(row_at(position, order, stores), dtype="<i4").tobytes(), seed=position)
        for position in range(step * BATCH, (step + 1) * BATCH)
    )
    assert open_batches().read(step).digest == expected % 2**64


@pytest.mark.parametrize(("rows", "micro_batch", "size"), [(24, 2, 3), (24, 1, 1), (25, 4, 2), (3, 2, 2), (24, 6, 4)])
def test_held_out_rows_are_shared_in_whole_micro_batches(
    stores: dict[str, TokenStore], rows: int, micro_batch: int, size: int
) -> None:
    store = stores["a"]
    shares = [held_out_batches(store, LENGTH, rows, micro_batch, rank, size) for rank in range(size)]
    counts = {len(share) for share in shares}
    assert counts == {rows // (micro_batch * size)}
    together = [row for several in zip(*shares, strict=True) for share in several for row in whole(share)[0].tolist()]
    assert together == [store.row(n, LENGTH).tolist() for n in range(counts.pop() * micro_batch * size)]


def test_held_out_rows_end_where_the_store_does(stores: dict[str, TokenStore]) -> None:
    store = stores["a"]
    batches = held_out_batches(store, LENGTH, 10**9, 1, 0, 1)
    assert len(batches) == store.rows(LENGTH)
    assert batches[0].tokens.shape == (1, 1, LENGTH)
