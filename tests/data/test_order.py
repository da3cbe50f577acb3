"""The order of samples is a function with the properties that the rest of the package builds on."""

import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.data.catalog import rows
from crystal_hpc.data.order import PhaseOrder, deal, run_orders
from crystal_hpc.data.permutation import ROUNDS, permute, permute_each, round_keys

LENGTH = 8
many = settings(deadline=None)
some = settings(deadline=None, max_examples=30)


def make_run(phases: list[tuple[int, dict[str, float]]], batch_size: int = 10, length: int = LENGTH) -> Run:
    """A run whose phases have so many steps and such a mixture."""
    names = {name for _, mixture in phases for name in mixture}
    content = {
        "name": "r",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 128},
        "data": {"tokenizer": "t", "sources": {name: name for name in names}},
        "phases": [
            {
                "name": f"phase{number}",
                "sequence_length": length,
                "batch_size": batch_size,
                "steps": steps,
                "mixture": mixture,
                "learning_rate": {"peak": 0.1},
            }
            for number, (steps, mixture) in enumerate(phases)
        ],
    }
    return Run.model_validate(content)


def orders_of(
    phases: list[tuple[int, dict[str, float]]], source_rows: dict[str, int], batch_size: int = 10, seed: int = 1
) -> list[PhaseOrder]:
    run = make_run(phases, batch_size).model_copy(update={"seed": seed})
    return run_orders(run, {name: count * LENGTH + 1 for name, count in source_rows.items()})


def first(order: PhaseOrder, count: int, start: int = 0) -> list[tuple[str, int, int]]:
    """(source, epoch, row) of positions start..start+count."""
    source, epoch, row = order.samples(np.arange(start, start + count))
    assert source.dtype == epoch.dtype == row.dtype == np.int64
    return [(order.sources[s], e, r) for s, e, r in zip(source.tolist(), epoch.tolist(), row.tolist(), strict=True)]


@st.composite
def mixtures(draw: st.DrawFn, most: int = 30) -> dict[str, float]:
    """Weights of 2 to `most` sources that sum to about one; some as small as 1e-6, some zero."""
    raw = draw(st.lists(st.floats(1e-6, 1.0) | st.sampled_from([1e-6, 0.0, 1.0]), min_size=2, max_size=most))
    raw[0] = max(raw[0], 0.01)
    return {f"s{n}": weight / sum(raw) for n, weight in enumerate(raw)}


# --- permutations


@many
@given(size=st.integers(1, 3000), key=st.text(max_size=5))
@example(size=1, key="")
@example(size=2, key="")
@example(size=1024, key="")
@example(size=1025, key="")
def test_permute_is_a_bijection_and_ints_equal_arrays(size: int, key: str) -> None:
    keys = round_keys(key)
    array = permute(np.arange(size), size, keys)
    assert array.dtype == np.int64
    assert sorted(array.tolist()) == list(range(size))
    picked = np.linspace(0, size - 1, min(size, 50)).astype(np.int64)
    assert [permute(index, size, keys) for index in picked.tolist()] == array[picked].tolist()


@many
@given(size=st.integers(1, 2**62), indices=st.lists(st.integers(0), min_size=1, max_size=8, unique=True))
def test_permute_stays_in_range_at_any_size(size: int, indices: list[int]) -> None:
    chosen = sorted({index % size for index in indices})
    values = permute(np.array(chosen, dtype=np.int64), size, round_keys("large")).tolist()
    assert values == [permute(index, size, round_keys("large")) for index in chosen]
    assert len(set(values)) == len(chosen)
    assert all(0 <= value < size for value in values)


@many
@given(places=st.lists(st.tuples(st.integers(1, 2**52), st.integers(0), st.text()), max_size=8))
def test_each_index_can_have_a_permutation_of_its_own(places: list[tuple[int, int, str]]) -> None:
    sizes = np.array([size for size, _, _ in places], np.int64)
    indices = np.array([index % size for size, index, _ in places], np.int64)
    keys = np.array([round_keys(key) for _, _, key in places], np.uint64).reshape(-1, ROUNDS).T
    one_by_one = [permute(index % size, size, round_keys(key)) for size, index, key in places]
    assert permute_each(indices, sizes, keys).tolist() == one_by_one


def test_another_key_is_another_permutation() -> None:
    permutations = [permute(np.arange(1000), 1000, round_keys(f"key {n}")) for n in range(20)]
    for one, other in pairwise(permutations):
        assert (one == other).sum() < 20


def test_a_permutation_leaves_no_trace_of_the_order_before() -> None:
    values = permute(np.arange(10_000), 10_000, round_keys("x")).astype(float)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(values, np.arange(10_000))[0, 1]) < 0.05


# --- blocks


@many
@given(levels=st.integers(1, 10), number=st.integers(0, 10**9), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_block_is_dealt_once_over_and_its_counts_are_those_of_counting(
    levels: int, number: int, key: int, data: st.DataObject
) -> None:
    block = 2**levels
    positions = np.arange(block, dtype=np.uint64) + np.uint64(number * block)
    edge = data.draw(st.integers(0, block))
    slots, below = deal(positions, np.uint64(edge) + 0 * positions, block, key)
    assert sorted(slots.tolist()) == list(range(block))
    assert below.tolist() == [int((slots[:n] < edge).sum()) for n in range(block)]
    index = data.draw(st.integers(0, block - 1))
    assert deal(int(positions[index]), edge, block, key) == (slots[index], below[index])


@many
@given(levels=st.integers(1, 9), key=st.integers(0, 2**64 - 1), data=st.data())
def test_every_aligned_stretch_of_a_block_gets_evenly_spaced_slots(levels: int, key: int, data: st.DataObject) -> None:
    block, part = 2**levels, 2 ** data.draw(st.integers(0, levels))
    slots, _ = deal(np.arange(block, dtype=np.uint64), np.zeros(block, np.uint64), block, key)
    for stretch in np.sort(slots.reshape(-1, part).astype(np.int64), axis=1):
        assert set(np.diff(stretch).tolist()) <= {block // part}


def test_blocks_differ_from_each_other() -> None:
    positions = np.arange(64 * 200, dtype=np.uint64)
    slots, _ = deal(positions, np.zeros_like(positions), 64, round_keys("x")[0])
    blocks = {tuple(block) for block in slots.reshape(-1, 64).tolist()}
    assert len(blocks) == 200
    # No position prefers a half of the block.
    assert np.abs((slots.reshape(-1, 64) < 32).mean(axis=0) - 0.5).max() < 0.2


# --- mixtures


@many
@given(mixture=mixtures(), number=st.integers(0, 10**7))
@example(mixture={"a": 1 - 29e-6} | {f"s{n}": 1e-6 for n in range(29)}, number=3)
def test_after_every_block_each_source_is_within_one_of_its_share(mixture: dict[str, float], number: int) -> None:
    (order,) = orders_of([(1, mixture)], dict.fromkeys(mixture, 5))
    exact = {name: Fraction(str(weight)) for name, weight in mixture.items()}
    samples = number * order.block
    consumed = order.consumed(samples)
    assert sum(consumed.values()) == samples
    for name, count in consumed.items():
        assert abs(count - exact[name] / sum(exact.values()) * samples) < 1


@some
@given(mixture=mixtures(), block=st.integers(0, 50), samples=st.integers(0, 1000), start=st.integers(0, 2000))
def test_consumed_is_what_counting_the_samples_gives(
    mixture: dict[str, float], block: int, samples: int, start: int
) -> None:
    (order,) = orders_of([(1, mixture)], dict.fromkeys(mixture, 7))
    begin = block * order.block + start
    before, after = order.consumed(begin), order.consumed(begin + samples)
    counted = Counter(source for source, _, _ in first(order, samples, begin))
    assert {name: after[name] - before[name] for name in order.sources} == {n: counted[n] for n in order.sources}


@many
@given(mixture=mixtures(), samples=st.integers(0, 2**20))
def test_at_no_moment_is_a_source_far_from_its_share(mixture: dict[str, float], samples: int) -> None:
    (order,) = orders_of([(1, mixture)], dict.fromkeys(mixture, 7))
    shares = np.diff([0.0, *map(float, order.cumulative)])
    # One at the ends of a block, and one for each level inside it.
    allowed = 1 + order.block.bit_length()
    for share, count in zip(shares, order.consumed(samples).values(), strict=True):
        assert abs(count - share * samples) < allowed


def test_a_source_of_weight_zero_is_absent() -> None:
    (order,) = orders_of([(100, {"a": 0.5, "b": 0.0, "c": 0.5})], {"a": 10, "b": 10, "c": 10})
    assert order.sources == ("a", "c")
    assert {source for source, _, _ in first(order, 1000)} == {"a", "c"}
    assert "b" not in order.consumed(1000)


def test_a_tiny_source_gets_its_samples() -> None:
    (order,) = orders_of([(1, {"most": 1 - 1e-6, "tiny": 1e-6})], {"most": 1000, "tiny": 3})
    assert order.consumed(10 * 2**20)["tiny"] in (10, 11)  # its share is 10.49
    found = [order.consumed(n)["tiny"] for n in range(0, 2**21, 2**17)]
    assert found == sorted(found) and found[0] == 0 and found[8] in (1, 2) and found[-1] in (1, 2, 3)


# --- epochs


@pytest.mark.parametrize("count", [1, 2, 17, 64, 100])
def test_each_epoch_visits_every_row_once_in_an_order_of_its_own(count: int) -> None:
    (order,) = orders_of([(1, {"a": 0.3, "b": 0.7})], {"a": count, "b": 50})
    taken = [(epoch, row) for source, epoch, row in first(order, 2000) if source == "a"]
    epochs = [[row for number, row in taken if number == epoch] for epoch in range(len(taken) // count)]
    assert len(epochs) > 5
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert [epoch for epoch, _ in taken] == sorted(epoch for epoch, _ in taken), "an epoch began before another ended"
    if count > 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@many
@given(
    plan=st.lists(st.tuples(st.integers(1, 40), mixtures(4)), min_size=2, max_size=4),
    counts=st.lists(st.integers(1, 90), min_size=4, max_size=4),
    batch_size=st.integers(1, 13),
)
@example(plan=[(3, {"s0": 0.5, "s1": 0.5}), (30, {"s0": 0.3, "s1": 0.7})], counts=[100] * 4, batch_size=10)
def test_phases_that_end_anywhere_share_epochs_without_repeating_or_skipping_a_row(
    plan: list[tuple[int, dict[str, float]]], counts: list[int], batch_size: int
) -> None:
    source_rows = {f"s{n}": count for n, count in enumerate(counts)}
    orders = orders_of(plan, source_rows, batch_size)
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in source_rows}
    for (steps, _), order in zip(plan, orders, strict=True):
        for source, epoch, row in first(order, steps * batch_size):
            seen[source].append((epoch, row))
    for name, taken in seen.items():
        assert len(set(taken)) == len(taken), "a row came twice in an epoch"
        complete, rest = divmod(len(taken), source_rows[name])
        sizes = Counter(epoch for epoch, _ in taken)
        assert sizes == {**dict.fromkeys(range(complete), source_rows[name]), **({complete: rest} if rest else {})}


def test_phases_of_another_sequence_length_start_their_own_epochs() -> None:
    run = make_run([(5, {"a": 1.0}), (5, {"a": 1.0}), (5, {"a": 1.0})])
    other = run.phases[1].model_copy(update={"sequence_length": 4})
    run = run.model_copy(update={"phases": [run.phases[0], other, run.phases[2]]})
    orders = run_orders(run, {"a": 801})
    assert [order.rows for order in orders] == [(100,), (200,), (100,)]
    assert [order.start for order in orders] == [(0,), (0,), (50,)]


# --- stability


@some
@given(mixture=mixtures(), steps=st.integers(1, 50), longer=st.integers(1, 50))
def test_a_longer_phase_keeps_all_earlier_positions(mixture: dict[str, float], steps: int, longer: int) -> None:
    source_rows = dict.fromkeys(mixture, 70)
    short, long = (orders_of([(n, mixture)], source_rows)[0] for n in (steps, steps + longer))
    assert first(short, steps * 10) == first(long, steps * 10)
    assert short == long


def test_changing_a_later_phase_moves_nothing_before_it() -> None:
    source_rows = {"a": 30, "b": 40, "c": 50}
    start = (7, {"a": 0.4, "b": 0.6})
    plain = orders_of([start, (9, {"a": 1.0})], source_rows)[0]
    assert orders_of([start], source_rows)[0] == plain
    assert orders_of([start, (2, {"b": 0.1, "c": 0.9}), (3, {"c": 1.0})], source_rows)[0] == plain


def test_positions_may_be_asked_in_any_order_and_any_number_of_times() -> None:
    (order,) = orders_of([(1, {"a": 0.3, "b": 0.7})], {"a": 13, "b": 50})
    positions = np.random.default_rng(0).integers(0, 500, 2000)
    expected = first(order, 500)
    found = [column.tolist() for column in order.samples(positions)]
    assert [(order.sources[s], e, r) for s, e, r in zip(*found, strict=True)] == [expected[p] for p in positions]
    assert [len(column) for column in order.samples(np.arange(0))] == [0, 0, 0]


def test_seed_and_phase_name_change_the_order_but_not_the_shares() -> None:
    source_rows, plan = {"a": 300, "b": 400}, [(1, {"a": 0.5, "b": 0.5})]
    one, other = orders_of(plan, source_rows, seed=1)[0], orders_of(plan, source_rows, seed=2)[0]
    assert first(one, 640) != first(other, 640)
    assert one.consumed(640) == other.consumed(640)


def test_the_order_can_never_silently_change() -> None:
    """Known answers. A change here changes what every existing run would read: it needs a new order version."""
    orders = orders_of([(5, {"a": 0.5, "b": 0.3, "c": 0.2}), (9, {"a": 0.05, "c": 0.95})], {"a": 10, "b": 100, "c": 6})
    assert first(orders[0], 12) == KNOWN_FIRST
    assert first(orders[1], 6) == KNOWN_SECOND
    assert first(orders[0], 4, 600_000_000) == KNOWN_FAR
    assert permute(np.arange(10), 10, round_keys("known")).tolist() == KNOWN_PERMUTATION


KNOWN_FIRST = [
    ("a", 0, 4),
    ("b", 0, 27),
    ("a", 0, 2),
    ("c", 0, 4),
    ("b", 0, 79),
    ("a", 0, 9),
    ("c", 0, 1),
    ("a", 0, 3),
    ("a", 0, 0),
    ("b", 0, 91),
    ("c", 0, 5),
    ("a", 0, 8),
]
KNOWN_SECOND = [("c", 1, 4), ("a", 2, 4), ("c", 1, 5), ("c", 2, 2), ("c", 2, 3), ("c", 2, 0)]
KNOWN_FAR = [("b", 1800000, 4), ("a", 30000000, 8), ("c", 20000000, 5), ("a", 30000000, 7)]
KNOWN_PERMUTATION = [6, 4, 8, 1, 5, 0, 7, 3, 9, 2]


# --- scale


def test_a_plan_of_a_trillion_tokens_answers_at_once_in_little_memory() -> None:
    weights = np.random.default_rng(0).dirichlet(np.full(30, 0.3))
    weights = np.maximum(weights, 1e-5)
    mixture = {f"s{n}": float(weight) for n, weight in enumerate(weights / weights.sum())}
    run = make_run([(79_721, mixture), (214_387, mixture), (27_728, mixture)], batch_size=2112, length=2048)
    assert derive.total_tokens(run) > 1.39e12
    tokens = {name: 50_000_000_000 for name in mixture}
    tracemalloc.start()
    begun = time.process_time()  # of this process, whatever else the machine does
    order = run_orders(run, tokens)[1]
    source, epoch, row = order.samples(np.arange(2112) + 600_000_000)
    elapsed, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert elapsed < 1
    assert peak < 20e6
    assert len(set(source.tolist())) > 10
    assert 0 <= epoch.min() <= epoch.max() < 10**6
    assert 0 <= row.min() <= row.max() < rows(50_000_000_000, 2048)
