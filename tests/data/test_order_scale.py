"""The order at the size of a real run, and its inverse: where a row is read, and from where a source repeats."""

import subprocess
import sys
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.permutation import permute, round_keys, unpermute

REPOSITORY = Path(__file__).parents[2]
LENGTH = 8
few = settings(deadline=None, max_examples=25)

# Crystal's three mixtures (its paper's tables 1 to 3) take nine tenths of each phase here, made-up sources the rest.
WEB = {"CommonCrawl": 0.533458, "C4": 0.266501, "ArXiv": 0.043251, "Book": 0.041312, "Wikipedia": 0.034171}
CODE = {"CommonCrawl": 0.198390, "C4": 0.0991, "StarCoder": 0.628118, "ArXiv": 0.016084, "StackExchange": 0.011785}
LAST = {"python": 0.342701, "html": 0.185367, "javascript": 0.183708, "css": 0.087928, "StarCoder": 0.033440}
SMALL = {f"small{n}": 10.0 ** -(1 + n % 5) / (n + 1) for n in range(19)}


def mixed(main: dict[str, float]) -> dict[str, float]:
    rest = sum(SMALL.values())
    return {n: 0.9 * w / sum(main.values()) for n, w in main.items()} | {n: 0.1 * w / rest for n, w in SMALL.items()}


CRYSTAL = [("prose", 79_721, mixed(WEB)), ("code", 214_387, mixed(CODE)), ("adaptation", 27_728, mixed(LAST))]
TOKENS = dict.fromkeys([*WEB, *CODE, *LAST], 250_000_000_000) | {name: 2_000_000_000 for name in SMALL}


def make_run(phases: list[tuple[str, int, dict[str, float]]], batch_size: int = 2112, length: int = 2048) -> Run:
    """A run whose phases have a name, steps and a mixture."""
    names = {name for *_, mixture in phases for name in mixture}
    shape = {"sequence_length": length, "batch_size": batch_size, "learning_rate": {"peak": 0.1}}
    return Run.model_validate(
        {
            "name": "r",
            "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 128},
            "data": {"tokenizer": "t", "sources": {name: name for name in names}},
            "phases": [{"name": n, "steps": steps, "mixture": mixture, **shape} for n, steps, mixture in phases],
        }
    )


def small_orders(plan: list[tuple[int, list[int]]], counts: list[int], batch_size: int = 7) -> list[PhaseOrder]:
    """Orders of phases of so many steps, with weights in hundredths, over sources of so many rows."""
    phases = [(f"p{n}", steps, shares(parts)) for n, (steps, parts) in enumerate(plan)]
    tokens = {f"s{n}": count * LENGTH + 1 for n, count in enumerate(counts)}
    return run_orders(make_run(phases, batch_size, LENGTH), tokens)


def shares(parts: list[int]) -> dict[str, float]:
    return {f"s{n}": part / sum(parts) for n, part in enumerate(parts)}


def read(order: PhaseOrder, samples: int) -> list[tuple[str, int, int]]:
    """(source, epoch, row) of the phase's first samples, by asking for each."""
    columns = (column.tolist() for column in order.samples(np.arange(samples)))
    return [(order.sources[source], epoch, row) for source, epoch, row in zip(*columns, strict=True)]


PLANS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 100), min_size=3, max_size=3)), min_size=1, max_size=3
)
COUNTS = st.lists(st.integers(1, 60), min_size=3, max_size=3)


# --- at scale


def test_any_batch_of_a_run_of_a_trillion_tokens_takes_little_memory() -> None:
    run = make_run(CRYSTAL)
    assert derive.total_tokens(run) > 1.39e12 and len(run.data.sources) == 30
    run_orders(run, TOKENS)[0].samples(np.arange(1))  # numpy's own first use is not the order's
    tracemalloc.start()
    for phase, order in zip(run.phases, run_orders(run, TOKENS), strict=True):
        steps = derive.phase_steps(phase)
        for step in (0, steps // 2, steps - 1):
            source, _, row = order.samples(np.arange(2112) + step * 2112)
            assert (row < np.array(order.rows)[source]).all() and (row >= 0).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6


def test_a_source_has_its_share_of_every_step_of_a_run_of_a_trillion_tokens() -> None:
    for (_, steps, mixture), order in zip(CRYSTAL, run_orders(make_run(CRYSTAL), TOKENS), strict=True):
        for step in (0, steps // 2, steps - 1):
            source, _, _ = order.samples(np.arange(2112) + step * 2112)
            found = np.bincount(source, minlength=len(order.sources))
            for name, count in zip(order.sources, found.tolist(), strict=True):
                assert abs(count - 2112 * mixture[name]) < 2 * (1 + order.block.bit_length())


def test_no_change_of_a_later_phase_moves_a_batch_of_a_large_run() -> None:
    prose, code, last = CRYSTAL
    longer = ("code", 300_000, code[2])
    other = ("adaptation", 5, {"Wikipedia": 1.0})
    plain = run_orders(make_run(CRYSTAL), TOKENS)
    assert run_orders(make_run([prose, code, other]), TOKENS)[:2] == plain[:2]
    assert run_orders(make_run([prose, longer, last]), TOKENS)[:2] == plain[:2]
    assert run_orders(make_run([prose]), TOKENS) == plain[:1]
    # ... while the phase after a longer one goes on where that one really ended.
    assert run_orders(make_run([prose, longer, last]), TOKENS)[2].start != plain[2].start


def test_the_scalar_ways_of_the_order_need_no_numpy() -> None:
    program = (
        "import sys; from tests.data.test_order_scale import small_orders; sys.modules.pop('numpy')\n"
        "sys.modules['numpy'] = None\n"  # importing it fails from here on
        "order = small_orders([(9, [30, 60, 10])], [5, 7, 2])[0]\n"
        "print(order.consumed(63), order.first_repeat('s0', 63), order.positions('s1', 3, 63))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, capture_output=True)


# --- the permutation's inverse


@pytest.mark.parametrize("size", range(1, 71))
def test_the_inverse_of_a_permutation_undoes_it(size: int) -> None:
    keys = round_keys(f"of {size}")
    assert [unpermute(permute(index, size, keys), size, keys) for index in range(size)] == list(range(size))


@few
@given(size=st.integers(1, 2**62) | st.just(10**11), index=st.integers(0, 2**62), key=st.text(max_size=3))
def test_the_inverse_of_a_permutation_undoes_it_at_any_size(size: int, index: int, key: str) -> None:
    keys = round_keys(key)
    assert unpermute(permute(index % size, size, keys), size, keys) == index % size
    assert permute(unpermute(index % size, size, keys), size, keys) == index % size


# --- positions of a row


@few
@given(plan=PLANS, counts=COUNTS, cut=st.integers(0, 6))
def test_positions_of_a_row_are_those_that_reading_everything_finds(
    plan: list[tuple[int, list[int]]], counts: list[int], cut: int
) -> None:
    for (steps, _), order in zip(plan, small_orders(plan, counts), strict=True):
        samples = steps * 7 - cut
        expected = defaultdict(list)
        for position, (source, epoch, row) in enumerate(read(order, samples)):
            expected[source, row].append((position, epoch))
        for name, count in zip(order.sources, order.rows, strict=True):
            for row in range(count):
                assert order.positions(name, row, samples) == expected[name, row]


@few
@given(phase=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True))
def test_positions_of_a_row_hold_that_row_in_a_run_of_a_trillion_tokens(phase: int, place: float) -> None:
    order, samples = run_orders(make_run(CRYSTAL), TOKENS)[phase], CRYSTAL[phase][1] * 2112
    position = int(place * samples)
    ((source,), (epoch,), (row,)) = (column.tolist() for column in order.samples(np.array([position])))
    name = order.sources[source]
    found = order.positions(name, row, samples)
    assert (position, epoch) in found
    assert [epoch for _, epoch in found] == sorted({epoch for _, epoch in found})
    sources, epochs, rows = order.samples(np.array([position for position, _ in found]))
    assert set(sources.tolist()) == {source} and set(rows.tolist()) == {row}
    assert epochs.tolist() == [epoch for _, epoch in found]
    # What lies at the very end counts only if the end lies behind it.
    assert (position, epoch) not in order.positions(name, row, position)
    assert order.positions(name, row, position + 1)[-1] == (position, epoch)


def test_a_source_that_a_phase_leaves_out_is_read_nowhere_and_repeats_nowhere() -> None:
    (order,) = run_orders(make_run([("p", 9, {"a": 1.0, "b": 0.0})], 7, LENGTH), {"a": 81, "b": 81})
    assert order.positions("b", 0, 63) == [] and order.first_repeat("b", 63) is None
    assert order.positions("a", 0, 0) == [] and order.first_repeat("a", 0) is None


# --- from where a source repeats


@few
@given(plan=PLANS, counts=COUNTS)
def test_the_first_repeat_is_the_one_that_reading_everything_finds(
    plan: list[tuple[int, list[int]]], counts: list[int]
) -> None:
    seen: set[tuple[str, int]] = set()
    for (steps, _), order in zip(plan, small_orders(plan, counts), strict=True):
        expected: dict[str, int] = {}
        for position, (source, _, row) in enumerate(read(order, steps * 7)):
            if (source, row) in seen:
                expected.setdefault(source, position)
            seen.add((source, row))
        for name in order.sources:
            assert order.first_repeat(name, steps * 7) == expected.get(name)


@pytest.mark.parametrize("count", [1, 7, 62, 63])
def test_a_repeat_is_found_to_the_very_sample(count: int) -> None:
    (order,) = small_orders([(10, [1])], [count])
    assert order.first_repeat("s0", count) is None
    assert order.first_repeat("s0", count + 1) == count


def test_a_repeat_in_a_large_run_is_the_first_sample_of_the_second_epoch() -> None:
    order, samples = run_orders(make_run(CRYSTAL), TOKENS)[1], CRYSTAL[1][1] * 2112
    position = order.first_repeat("StarCoder", samples)
    assert position is not None
    ((source,), (epoch,), _) = (column.tolist() for column in order.samples(np.array([position])))
    assert (order.sources[source], epoch) == ("StarCoder", 1)
    assert order.first_repeat("StarCoder", position) is None
    assert order.first_repeat("StarCoder", position + 1) == position
    assert order.start[source] + order.consumed(position)["StarCoder"] == order.rows[source]
