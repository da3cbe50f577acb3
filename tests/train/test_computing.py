"""How a run is computed changes nothing of what it computes: recomputation, overlap, sequence parallelism, padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig
from ranks import Order, Ranks, look_in_step

from crystal_hpc.train.manifest import read_manifest

# As in test_layouts: the same arithmetic in float32, added in another order.
RELATIVE_TOLERANCE = 5e-6
SIX = look_in_step(6)

RECOMPUTED = [
    "recompute.mode=full",
    "recompute={mode: full, layers: 1}",
    "recompute.mode=selective",
    "recompute={mode: selective, modules: [mlp, core_attn]}",
]


@pytest.mark.parametrize("bias", ["true", "false"])
def test_recomputation_changes_no_bit(one: Ranks, new_run: Callable[..., Path], bias: str) -> None:
    model = f"model.bias={bias}"
    plain = one.train(Order(new_run("plain", model), signal_at_look=SIX))
    for number, how in enumerate(RECOMPUTED):
        assert_same(one.train(Order(new_run(f"how-{number}", model, how), signal_at_look=SIX)), plain, how)


def test_deterministic_mode_gives_the_same_bits_twice_and_the_same_losses(
    one: Ranks, new_run: Callable[..., Path]
) -> None:
    plain = one.train(Order(new_run("plain"), signal_at_look=SIX))
    first, second = (
        one.train(Order(new_run(f"run-{number}", "deterministic=true"), signal_at_look=SIX)) for number in (1, 2)
    )
    assert_same(second, first, "deterministic")
    np.testing.assert_allclose(first.losses, plain.losses, rtol=RELATIVE_TOLERANCE)


def assert_same(seen: Any, plain: Any, how: str) -> None:
    assert seen.losses == plain.losses, how
    assert all(np.array_equal(seen.weights[name], weights) for name, weights in plain.weights.items()), how


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overlapped_communication_changes_no_bit_also_of_what_is_saved_and_evaluated(
    two: Ranks, new_run: Callable[..., Path], precision: str
) -> None:
    common = (f"precision={precision}", "parallel.distributed_optimizer=true")
    plain_run = new_run("plain", *common)
    overlap = ("parallel.overlap_gradients=true", "parallel.overlap_parameters=true")
    overlapped_run = new_run("overlapped", *common, *overlap)
    plain = two.train(Order(plain_run))
    first = two.train(Order(overlapped_run, signal_at_look=look_in_step(7)))
    rest = two.train(Order(overlapped_run))
    assert first.losses + rest.losses == plain.losses
    for manifest in plain_run.glob("checkpoints/*/*/manifest.json"):
        place = overlapped_run / manifest.parent.relative_to(plain_run)
        if place.exists():
            assert rig.state_saved(place) == rig.state_saved(manifest.parent), place


def test_without_the_distributed_optimizer_gradients_can_be_overlapped_alone(
    two: Ranks, new_run: Callable[..., Path]
) -> None:
    plain = two.train(Order(new_run("plain", "parallel.distributed_optimizer=false"), signal_at_look=SIX))
    overlap = ("parallel.distributed_optimizer=false", "parallel.overlap_gradients=true")
    seen = two.train(Order(new_run("overlapped", *overlap), signal_at_look=SIX))
    assert seen.losses == plain.losses


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_sequence_parallel_ranks_compute_the_same(
    one: Ranks, two: Ranks, new_run: Callable[..., Path], norm: str
) -> None:
    model = f"model.norm={norm}"
    alone = one.train(Order(new_run("alone", model), signal_at_look=look_in_step(10)))
    shared = ("parallel.tensor=2", "parallel.sequence=true", "recompute.mode=full")
    seen = two.train(Order(new_run("shared", model, *shared), signal_at_look=look_in_step(10)))
    np.testing.assert_allclose(seen.losses, alone.losses, rtol=RELATIVE_TOLERANCE)


def test_a_padded_width_computes_the_same_and_leaves_no_trace_in_checkpoints(
    one: Ranks, two: Ranks, new_run: Callable[..., Path]
) -> None:
    alone = one.train(Order(new_run("alone", "model.ffn=85")))
    folder = new_run("padded", "model.ffn=85", "parallel.tensor=2")
    first = two.train(Order(folder, signal_at_look=look_in_step(7)))
    rest = one.train(Order(folder, overrides=("parallel.tensor=1",)))
    np.testing.assert_allclose(first.losses + rest.losses, alone.losses, rtol=RELATIVE_TOLERANCE)
    shapes = {name.rpartition("mlp.")[2]: entry.shape for name, entry in saved_by_two(folder).items()}
    assert shapes["linear_fc1.weight"] == (170, 32)
    assert shapes["linear_fc1.bias"] == (170,)
    assert shapes["linear_fc2.weight"] == (32, 85)


def saved_by_two(folder: Path) -> dict[str, Any]:
    found = [read_manifest(path.parent) for path in folder.glob("checkpoints/*/*/manifest.json")]
    return dict(next(manifest.tensors for manifest in found if manifest.layout["ranks"] == 2))


def test_what_pads_a_width_stays_zero(new_run: Callable[..., Path]) -> None:
    overrides = ("model.ffn=85", "parallel.tensor=2", "precision=bf16")
    folder = new_run("padded", *overrides)
    (_, first), (_, second) = rig.values(rig.run_ranks(padding_after_training, 2, folder))
    assert first == []
    assert second == [0.0] * 6, "two layers, each with two rows, a column, and two biases that belong to nobody"


def padding_after_training(rank: int, size: int, meeting: str, folder: Path) -> tuple[float, list[float]]:
    """The last loss, and the largest number in each part of this rank's model that is padding."""
    from crystal_hpc.train import loop, sharding

    _, job = rig.attempt(rank, size, meeting, folder)
    loop.train(job)
    found = []
    for name, parameter in sharding.module(job.trainer).named_parameters():
        kind = name.rpartition("mlp.")[2]
        if rank == size - 1 and kind in ("linear_fc1.weight", "linear_fc1.bias"):
            gate, up = parameter.detach().chunk(2)
            found.append(max(gate[-1].abs().max().item(), up[-1].abs().max().item()))
        elif rank == size - 1 and kind == "linear_fc2.weight":
            found.append(parameter.detach()[:, -1].abs().max().item())
    return 0.0, found
