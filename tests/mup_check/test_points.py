"""What a sweep trains, and what cannot be swept."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import ConfigError
from crystal_hpc.mup_check.points import Sweep, at_width, points

SWEEP = Sweep([64, 128], [0.01, 0.02], 20, [32, 64, 128], 0.001, 4)


@pytest.fixture
def run(narrow_file: Path) -> Run:
    return load_run(narrow_file)


def test_each_width_is_trained_with_and_without_mup_at_each_rate_and_the_longest_first(run: Run) -> None:
    found = points(run, SWEEP)
    assert len({point.name for point in found}) == len(found) == 2 * 2 * 2 + 2 * 3
    assert len({point.about["digest"] for point in found}) == len(found)
    assert [point.width for point in found] == sorted((point.width for point in found), reverse=True)


def test_a_wider_model_has_more_heads_of_the_same_width(run: Run) -> None:
    wide = at_width(run, 256, True, 0.01, 20)
    assert (wide.model.hidden, wide.model.heads, wide.model.ffn, wide.model.layers) == (256, 16, 680, 1)
    assert wide.mup == run.mup
    assert (wide.parallel.tensor, wide.parallel.pipeline, len(wide.phases)) == (1, 1, 1)


def test_without_mup_weights_start_alike_at_the_base_width_and_as_small_when_wider(run: Run) -> None:
    for width in (64, 256):
        with_mup, without = (at_width(run, width, mup, 0.01, 20) for mup in (True, False))
        assert without.mup is None
        for role in ("matrix", "residual"):
            stds = [derive.init_std(one.model, one.mup, role) for one in (with_mup, without)]
            assert math.isclose(*stds)


def test_the_rate_rises_in_the_first_tenth_and_falls_to_zero_or_stays(run: Run) -> None:
    (falls,), (stays,) = (at_width(run, 64, True, 0.01, 20, constant).phases for constant in (False, True))
    rates = [derive.learning_rate(falls, step) for step in range(21)]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert rates[20] == 0
    assert {derive.learning_rate(stays, step) for step in range(20)} == {0.01}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"widths": [64, 100]}, "width 100: not a multiple of the heads' width, 16 .* choose 96 or 112"),
        ({"coordinate_widths": [64, 8]}, "width 8: not a multiple .* choose 16 or 32"),
        ({"widths": [64, 64]}, "widths: give two or more"),
        ({"rates": [0.01, 0.0]}, "learning rate 0: must be above 0"),
        ({"rates": [math.nan]}, "learning rate nan: must be above 0"),
        ({"steps": 0}, "steps: at least 1"),
        ({"rates": [], "coordinate_steps": 0}, "nothing is asked for"),
    ],
)
def test_what_cannot_be_swept_is_an_error_that_says_why(run: Run, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        points(run, replace(SWEEP, **wrong))  # type: ignore[arg-type]


def test_only_the_first_phase_is_read_and_what_is_not_renewed_outside_a_job_is_left_out(narrow_file: Path) -> None:
    run = load_run(narrow_file, ["precision=bf16", "fp8={recipe: tensorwise}"])
    narrow = at_width(run, 64, True, 0.01, 20)
    assert narrow.fp8 is None
    assert (set(narrow.data.sources), narrow.data.held_out) == (set(run.phases[0].mixture), {})


def test_a_width_that_cannot_be_trained_is_named(run: Run) -> None:
    three = run.model_copy(update={"parallel": run.parallel.model_copy(update={"micro_batch": 3})})
    with pytest.raises(ConfigError, match="width 128: phases.0.batch_size"):
        points(three, SWEEP)


def test_a_width_of_which_no_feed_forward_network_is_left_is_named(narrow_file: Path) -> None:
    flat = load_run(narrow_file, ["model.ffn=3"])
    with pytest.raises(ConfigError, match="width 16: leaves nothing of model.ffn = 3, .* choose 22 or more"):
        points(flat, replace(SWEEP, widths=[16, 64]))


def test_a_run_without_mup_has_nothing_to_check(narrow_file: Path) -> None:
    with pytest.raises(ConfigError, match="mup: the run does not use it"):
        points(load_run(narrow_file, ["mup=null"]), SWEEP)
