"""A run that begins with the weights of another has exactly these weights, and nothing else of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import generation, join, run_ranks, short_run, unlike, values

from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.distcp import Reader, Request


def begin(rank: int, size: int, meeting: str, folder: Path, source: Path, *overrides: str) -> Any:
    """Loads as an attempt does; returns which weights are not those of the source, and the largest moment."""
    from crystal_hpc.train import optim, sharding
    from crystal_hpc.train.restore import load_latest

    trainer = join(rank, size, f"{meeting}-{folder.name}", folder, [f"start_from={source}", *overrides])
    position, manifest = load_latest(trainer, folder)
    assert (position.phase, position.step, manifest) == (0, 0, None)
    model = sharding.model_parts(sharding.module(trainer))
    state = sharding.optimizer_parts(trainer)
    mains = [part for part in state if ".fp32_param." in part.key]
    moments = [float(part.tensor.abs().max()) for part in state if ".exp_avg" in part.key]
    reader = Reader(source)
    wrong = unlike(model, source)
    for part in mains:
        key = part.key if part.key in reader.tensors else part.key.removeprefix("optimizer.state.fp32_param.")
        expected = torch.empty(part.tensor.shape)
        reader.read([Request(key, part.offset, expected)])
        wrong += [] if torch.equal(expected, part.tensor) else [part.key]
    return wrong, max(moments), optim.steps(trainer.optimizer), len(mains)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_begins_with_the_weights_of_another_and_without_its_moments(
    new_run: Callable[..., Path], precision: str
) -> None:
    settings = (f"precision={precision}", "parallel.distributed_optimizer=true")
    source = generation(short_run(new_run, 1, *settings), 3)
    folder = new_run("beginner", *settings)
    for wrong, moment, steps, mains in values(run_ranks(begin, 2, folder, source)):
        assert (wrong, moment, steps) == ([], 0.0, 0)
        assert (mains > 0) == (precision == "bf16")


def test_weights_of_a_model_with_the_same_shapes_and_another_meaning_are_refused_at_once(
    new_run: Callable[..., Path],
) -> None:
    source = generation(short_run(new_run, 1), 3)
    new_run("alike", f"start_from={source}", "model.init_std=0.05")
    with pytest.raises(CheckpointError, match=r"mup\.output_multiplier = 3\.0, not 2\.22"):
        new_run("unlike", f"start_from={source}", "mup.output_multiplier=3.0")
    with pytest.raises(CheckpointError, match="no such|has no manifest"):
        new_run("nowhere", "start_from=nothing-there")


def test_a_source_that_is_damaged_or_of_another_shape_is_refused(new_run: Callable[..., Path]) -> None:
    source = generation(short_run(new_run, 1), 3)
    (ended,) = run_ranks(begin, 1, new_run("wider"), source, "model.ffn=96")
    assert isinstance(ended.error, CheckpointError)
    assert "has shape" in str(ended.error) and "name another" in str(ended.error)
    data = source / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    copied = new_run("damaged") / "source"
    copied.mkdir()
    for path in source.iterdir():
        (copied / path.name).write_bytes(content if path == data else path.read_bytes())
    (ended,) = run_ranks(begin, 1, new_run("refusing"), copied)
    assert isinstance(ended.error, CheckpointError) and "__0_0.distcp is damaged" in str(ended.error)
