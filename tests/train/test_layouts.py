"""The same run under every parallel layout: the same samples, and losses that agree."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ranks import Order, Ranks, look_in_step

# The layouts do the same arithmetic in float32 but add in another order: a sum over micro-batches becomes a sum over
# ranks, a matrix product is cut in two. Each addition rounds to 6e-8 of its result; in ten steps at this size the
# losses, of about 6, were measured to differ by 2.2e-8 of themselves under each layout (Python 3.11). The tolerance
# leaves room for other processors and versions, whose products add in other orders.
RELATIVE_TOLERANCE = 5e-6

LAYOUTS = {
    "DP=2": ("parallel.distributed_optimizer=false",),
    "DP=2, distributed optimizer": ("parallel.distributed_optimizer=true",),
    "TP=2": ("parallel.tensor=2",),
    "PP=2": ("parallel.pipeline=2",),
}


def test_the_first_ten_losses_agree_under_every_layout(one: Ranks, two: Ranks, new_run: Callable[..., Path]) -> None:
    alone = one.train(Order(new_run("alone"), signal_at_look=look_in_step(10)))
    assert len(alone.losses) == 10
    assert alone.losses[9] < alone.losses[0], "the model learns, so that agreement means something"
    for name, overrides in LAYOUTS.items():
        folder = new_run("layout", *overrides)
        seen = two.train(Order(folder, signal_at_look=look_in_step(10)))
        folder.rename(folder.with_name(name.replace(" ", "-")))
        np.testing.assert_allclose(seen.losses, alone.losses, rtol=RELATIVE_TOLERANCE, err_msg=name)
        assert seen.digests == alone.digests, f"{name}: other samples"


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_a_run_saved_by_two_data_parallel_ranks_goes_on_with_one_and_sees_the_same_samples(
    one: Ranks, two: Ranks, new_run: Callable[..., Path], distributed: str
) -> None:
    setting = f"parallel.distributed_optimizer={distributed}"
    whole = two.train(Order(new_run("whole", setting)))
    parted = new_run("parted", setting)
    first = two.train(Order(parted, signal_at_look=look_in_step(7)))
    rest = one.train(Order(parted))
    assert (len(first.losses), len(rest.losses)) == (7, 5)
    assert first.digests + rest.digests == whole.digests
    np.testing.assert_allclose(first.losses + rest.losses, whole.losses, rtol=RELATIVE_TOLERANCE)


@pytest.mark.parametrize(
    ("before", "after"),
    [("parallel.tensor=2", "parallel.pipeline=2"), ("parallel.pipeline=2", "parallel.tensor=2")],
)
def test_a_run_saved_under_one_model_parallel_layout_goes_on_under_another(
    one: Ranks, two: Ranks, new_run: Callable[..., Path], before: str, after: str
) -> None:
    alone = one.train(Order(new_run("alone")))
    folder = new_run("changed", before)
    first = two.train(Order(folder, signal_at_look=look_in_step(6)))
    reset = tuple(f"parallel.{key}=1" for key in ("tensor", "pipeline"))
    rest = two.train(Order(folder, overrides=(*reset, after)))
    np.testing.assert_allclose(first.losses + rest.losses, alone.losses, rtol=RELATIVE_TOLERANCE)
    assert first.digests + rest.digests == alone.digests


def test_bfloat16_training_follows_float32(one: Ranks, new_run: Callable[..., Path]) -> None:
    exact = one.train(Order(new_run("fp32"), signal_at_look=look_in_step(10)))
    rounded = one.train(Order(new_run("bf16", "precision=bf16"), signal_at_look=look_in_step(10)))
    # bfloat16 keeps 8 bits: 4e-3 of a value.
    np.testing.assert_allclose(rounded.losses, exact.losses, rtol=4e-3)
    assert rounded.losses != exact.losses
