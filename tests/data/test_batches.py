"""Batches: the rows that the order names, shared out among ranks, the same with or without reading ahead."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from crystal_hpc.config.schema import Fim, Run
from crystal_hpc.data.batches import PhaseBatches, StepBatch, held_out_batches
from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.fim import PhaseFim, Place, Rewriter
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.rows import Rows, rows_digest
from crystal_hpc.data.store import TokenStore
from crystal_hpc.data.tokenizer import Tokenizer

LENGTH, BATCH = 16, 24
Open = Callable[..., PhaseBatches]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> dict[str, TokenStore]:
    folder = tmp_path_factory.mktemp("stores")
    for seed, name in enumerate(["a", "b"]):
        build_store([corpus], folder / name, tokenizer_folder, Options(seed=seed))
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


@pytest.fixture(scope="module")
def fim(order: PhaseOrder, tokenizer_folder: Path) -> PhaseFim:
    """FIM of source `b` alone."""
    return PhaseFim({"b": Fim(rate=0.9, loss="middle")}, Rewriter(Tokenizer.load(tokenizer_folder), 1))


def test_fim_changes_the_rows_of_its_source_alone_and_brings_a_mask(
    stores: dict[str, TokenStore], order: PhaseOrder, fim: PhaseFim
) -> None:
    batches = PhaseBatches(order, stores, BATCH, 2, fim=fim)
    batch = batches.read(3)
    batches.close()
    assert batch.loss_mask is not None and batch.loss_mask.shape == batch.tokens.shape == batch.labels.shape
    assert [micro_batch["loss_mask"].shape for micro_batch in batch] == [(2, LENGTH)] * (BATCH // 2)
    rows, masks = whole(batch).reshape(BATCH, -1), batch.loss_mask.reshape(BATCH, -1)
    changed = 0
    for position, (row, mask) in enumerate(zip(rows, masks, strict=True), 3 * BATCH):
        source, epoch, number = (int(column[0]) for column in order.samples(np.array([position])))
        plain = row_at(position, order, stores)
        if order.sources[source] == "a":
            assert row.tolist() == plain and mask.all()
        else:
            whole_row = np.array([plain], np.int32)
            done, counts = fim.rewriter.rewrite(whole_row, [Place("b", epoch, number)], [fim.by_source["b"]])
            assert row.tolist() == done[0].tolist() and mask.tolist() == counts[0].tolist()
            changed += row.tolist() != plain
    assert changed > 2


@pytest.mark.parametrize(("micro_batch", "size"), [(1, 1), (2, 3), (4, 6)])
def test_a_step_with_fim_is_the_same_whatever_the_ranks(
    stores: dict[str, TokenStore], order: PhaseOrder, fim: PhaseFim, micro_batch: int, size: int
) -> None:
    def read(micro_batch: int, rank: int, size: int) -> StepBatch:
        batches = PhaseBatches(order, stores, BATCH, micro_batch, rank, size, fim)
        ahead, plain = batches.step(7), batches.read(8)
        assert torch.equal(batches.step(8).tokens, plain.tokens) and ahead.digest != plain.digest
        batches.close()
        return ahead

    expected = read(BATCH, 0, 1)
    shares = [read(micro_batch, rank, size) for rank in range(size)]
    for name in ("tokens", "labels"):
        together = torch.stack([getattr(share, name) for share in shares], dim=1)
        assert torch.equal(together.reshape(BATCH, -1), getattr(expected, name)[0])
    everything = torch.ones(BATCH // micro_batch // size, micro_batch, LENGTH, dtype=torch.bool)
    masks = [everything if share.loss_mask is None else share.loss_mask for share in shares]
    assert expected.loss_mask is not None
    assert torch.equal(torch.stack(masks, dim=1).reshape(BATCH, -1), expected.loss_mask[0])
    assert sum(share.digest for share in shares) % 2**64 == expected.digest


def test_a_digest_tells_masks_and_labels_that_are_not_one_ahead() -> None:
    inputs = np.arange(12, dtype=np.int32).reshape(2, 6)
    labels, at = inputs + 1, np.array([4, 9])
    plain = rows_digest(Rows(inputs, labels), at)
    assert plain == rows_digest(Rows(inputs, labels, np.ones((2, 6), bool)), at), "a mask that says nothing is none"
    alone = [rows_digest(Rows(inputs[n : n + 1], labels[n : n + 1]), at[n : n + 1]) for n in range(2)]
    assert sum(alone) % 2**64 == plain
    other, mask = labels.copy(), np.ones((2, 6), bool)
    other[1, 2], mask[1, 2] = 0, False
    seen = [rows_digest(Rows(inputs, x, y), at) for x in (labels, other) for y in (None, mask)]
    assert len(set(seen)) == 4 and seen[0] == plain
