"""A run that is interrupted ends with the same weights, bit for bit, as one that is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import LOOKS, STEPS, Order, Ranks, look_in_step

from crystal_hpc import files
from crystal_hpc.report.ledger import check_ledger


def assert_same_weights(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(seen[name], value, err_msg=name)


@pytest.mark.parametrize("layout", ["one rank", "two ranks, distributed optimizer"])
def test_a_run_interrupted_after_every_step_ends_bit_equal_to_one_that_is_not(
    one: Ranks, two: Ranks, new_run: Callable[..., Path], layout: str
) -> None:
    group, size = (one, 1) if layout == "one rank" else (two, 2)
    setting = f"parallel.distributed_optimizer={'true' if group is two else 'false'}"
    undisturbed = group.train(Order(new_run("undisturbed", setting)))
    folder, steps, attempts = new_run("disturbed", setting), 0, 0
    while steps < STEPS:
        # The next step is the first of the attempt, but after the end of a phase two more looks come before it.
        look = 4 if steps in (5, 9) else 2
        seen = group.train(Order(folder, look, signal_rank=attempts % size))
        steps, attempts = steps + len(seen.losses), attempts + 1
        assert (seen.stop, steps) == ("TIME_LIMIT", attempts), "every attempt takes one step"
    last = group.train(Order(folder))
    assert (last.stop, last.losses, last.position) == ("NO", [], undisturbed.position)
    assert_same_weights(last.weights, undisturbed.weights)
    lines = list(files.read_lines(folder / "metrics.jsonl"))
    assert [line["digest"] for line in lines] == undisturbed.digests
    assert [line["loss"] for line in lines] == undisturbed.losses
    assert "12 steps, 96 samples: each read once, as planned; no step done twice" in check_ledger(folder)


@pytest.mark.parametrize("look", range(1, LOOKS + 1))
def test_a_run_interrupted_at_any_look_at_the_flag_ends_bit_equal(
    two: Ranks, new_run: Callable[..., Path], undisturbed: dict[str, Any], look: int
) -> None:
    folder = new_run("interrupted", "parallel.distributed_optimizer=true")
    first = two.train(Order(folder, look, signal_rank=1))
    assert first.stop == "TIME_LIMIT"
    rest = two.train(Order(folder))
    assert first.digests + rest.digests == undisturbed["digests"]
    assert_same_weights(rest.weights, undisturbed["weights"])


def test_a_signal_during_evaluation_leaves_it_to_the_next_attempt(
    one: Ranks, new_run: Callable[..., Path], tiny_data: Path
) -> None:
    folder = new_run("evaluated", f"data.held_out={{held-out: {tiny_data / 'held-out'}}}")
    in_evaluation = look_in_step(5) + 2
    first = one.train(Order(folder, in_evaluation))
    assert (first.stop, first.position) == ("TIME_LIMIT", (0, 5))
    assert not (folder / "evals" / "prose.json").exists()
    one.train(Order(folder))
    evaluated = {path.stem: files.read_json(path) for path in (folder / "evals").glob("*.json")}
    assert evaluated.keys() == {"prose", "code", "adaptation"}
    assert evaluated["prose"]["rows"] == {"held-out": 8}
    assert 0 < evaluated["adaptation"]["losses"]["held-out"] < 10


def test_a_crash_goes_back_to_the_last_checkpoint_and_ends_bit_equal(
    two: Ranks, new_run: Callable[..., Path], undisturbed: dict[str, Any]
) -> None:
    folder = new_run("crashed", "parallel.distributed_optimizer=true")
    two.train(Order(folder, look_in_step(8)))
    saved = folder / "checkpoints" / "code"
    # As if the save after the third step of `code` had been cut short: what it wrote is there, but never renamed.
    (saved / "step_00000003").rename(saved / "step_00000003.pending")
    rest = two.train(Order(folder))
    assert len(rest.losses) == STEPS - 7, "goes on from the periodic checkpoint after two steps of `code`"
    assert_same_weights(rest.weights, undisturbed["weights"])
    assert "1 steps done twice" in check_ledger(folder)


def test_a_finished_run_that_is_started_again_does_nothing(one: Ranks, new_run: Callable[..., Path]) -> None:
    folder = new_run("again")
    one.train(Order(folder))
    again = one.train(Order(folder))
    assert (again.stop, again.losses, again.position) == ("NO", [], (2, 3))


def test_a_history_with_another_sample_in_it_is_found_out(one: Ranks, new_run: Callable[..., Path]) -> None:
    folder = new_run("tampered")
    one.train(Order(folder, look_in_step(3)))
    path = folder / "metrics.jsonl"
    digest = list(files.read_lines(path))[1]["digest"]
    path.write_text(path.read_text().replace(digest, "0123456789abcdef"))
    with pytest.raises(Exception, match="step 1 of phase prose read other rows"):
        check_ledger(folder)


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def undisturbed(two: Ranks, new_run: Callable[..., Path], kept: dict[str, Any]) -> dict[str, Any]:
    """Weights and digests of a run that nothing happened to, made once."""
    if not kept:
        seen = two.train(Order(new_run("reference", "parallel.distributed_optimizer=true")))
        kept.update(weights=seen.weights, digests=seen.digests)
    return kept
