"""On one GPU: every number format trains, what is logged as used is what ran, and a run can be interrupted.

All of it is skipped without a GPU; the same contracts are tested on the CPU rig elsewhere.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import ranks as helpers
import rig
import torch
from ranks import Order, Ranks, look_in_step
from test_tensor_names import SAVED, names_saved

from crystal_hpc.errors import CheckpointError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with Transformer Engine"),
]

# Widths that 8-bit products can have, heads that fused attention knows.
MODEL = (
    "model={layers: 2, hidden: 256, heads: 4, ffn: 680, vocab_size: 536, init_std: 0.073}",
    "mup={base_hidden: 64, embedding_multiplier: 4, output_multiplier: 1}",
    "precision=bf16",
    "parallel={micro_batch: 4, distributed_optimizer: true}",
)
PHASES = (
    "phases=[{name: prose, sequence_length: 128, batch_size: 8, steps: 6, mixture: {prose: 1.0}, checkpoint_every: 3, "
    "learning_rate: {peak: 0.01, warmup_steps: 1, end: 0.001}}]"
)
FORMATS = {
    "bf16": (),
    "tensorwise": ("fp8={recipe: tensorwise}",),
    "blockwise": ("fp8={recipe: blockwise}",),
    "delayed": ("fp8={recipe: delayed}",),
    "plain layers": ("kernels={layers: megatron}",),
    "plain loss": ("kernels={cross_entropy: unfused}",),
}
EIGHT_BITS = ("tensorwise", "blockwise", "delayed")
PLAIN = ("plain layers", "plain loss")
"""In bfloat16, by the kernels that the CPU rig has, too."""
STEPS = 60
CHOICES = 8
"""Each token can be followed by so many, all as likely: the loss falls towards the logarithm of this."""
BAND = 0.05
"""How far from BF16's the mean loss of the last 20 steps may be in FP8, as a share of it."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[str, dict[str, Any]]:
    """What one process saw when it trained the same model in each format."""
    folder = tmp_path_factory.mktemp("formats")
    (found,) = rig.values(rig.run_ranks(train_in_all_formats, 1, folder, tiny_data))
    result: dict[str, dict[str, Any]] = found
    return result


def train_in_all_formats(
    rank: int, size: int, meeting: str, folder: Path, data: Path, formats: dict[str, tuple[str, ...]] = FORMATS
) -> dict[str, dict[str, Any]]:
    from crystal_hpc.model import parallel

    found = {}
    for name, overrides in formats.items():
        (folder / name).mkdir()
        (folder / name / "run.yaml").write_text(
            f"name: {name.replace(' ', '-')}\nmodel: {{layers: 1, hidden: 1, heads: 1, ffn: 1, vocab_size: 536}}\n"
            f"data: {{tokenizer: {data / 'tokenizer'}, sources: {{prose: {data / 'prose'}}}}}\n"
            "phases: [{name: prose, sequence_length: 1, batch_size: 1, steps: 1, mixture: {prose: 1.0}, "
            "learning_rate: {peak: 1.0}}]\n"
        )
        log = folder / name / "log.txt"
        logging.getLogger("crystal_hpc").addHandler(logging.FileHandler(log))
        logging.getLogger("crystal_hpc").setLevel(logging.INFO)
        trainer = rig.join(rank, size, f"{meeting}-{len(found)}", folder / name, (*MODEL, PHASES, *overrides))
        found[name] = {"losses": losses(trainer), "logged": log.read_text().splitlines(), **what_ran(trainer)}
        del trainer
        parallel.stop()
        if torch.cuda.is_available():
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()
    return found


def losses(trainer: Any) -> list[float]:
    """Of text in which what follows is a matter of chance among few."""
    from crystal_hpc.data.batches import StepBatch
    from crystal_hpc.train.step import train_step

    chance = np.random.default_rng(1)
    found = []
    for step in range(STEPS):
        rows = np.zeros((2, 4, 129), np.int64)
        for place in range(1, 129):
            rows[..., place] = (rows[..., place - 1] * 5 + chance.integers(0, CHOICES, (2, 4))) % 64
        tokens = torch.from_numpy(rows)
        batch = StepBatch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous())
        found.append(train_step(trainer, batch, 0.01 * min(1.0, (step + 1) / 10), []).loss)
    return found


def what_ran(trainer: Any) -> dict[str, Any]:
    """Facts about the model after its steps, to hold against what was logged."""
    from crystal_hpc.train import optim, sharding

    model = sharding.module(trainer)
    block = model.decoder.layers[0]
    matrix = block.mlp.linear_fc1
    recipe = getattr(matrix, "fp8_meta", {}).get("recipe") if getattr(matrix, "fp8", False) else None
    return {
        "used": trainer.used.line(),
        "device": matrix.weight.device.type,
        "layers": type(matrix).__module__,
        "attention": type(block.self_attention.core_attention).__name__,
        "recipe": type(recipe).__name__ if recipe is not None else "",
        "in place": bool(getattr(matrix.weight, "grad_added_to_main_grad", False)),
        "width": matrix.weight.shape[0],
        "optimizers": sorted({type(inner).__module__ for inner in optim._inner_optimizers(trainer.optimizer)}),
        "fused rotation": model.config.apply_rope_fusion,
        "fused loss": model.config.cross_entropy_loss_fusion,
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_with_a_falling_loss(seen: dict[str, dict[str, Any]], name: str) -> None:
    curve = seen[name]["losses"]
    assert all(np.isfinite(curve))
    assert curve[0] > 5 > np.log(CHOICES)
    assert fmean(curve[-10:]) < 0.7 * curve[0]


@pytest.mark.parametrize("name", PLAIN)
def test_fused_kernels_compute_what_plain_ones_do(seen: dict[str, dict[str, Any]], name: str) -> None:
    assert seen[name]["used"] != seen["bf16"]["used"]
    assert seen[name]["losses"][0] == pytest.approx(seen["bf16"]["losses"][0], rel=2e-3)
    assert seen[name]["losses"][:5] == pytest.approx(seen["bf16"]["losses"][:5], rel=2e-2)
    assert fmean(seen[name]["losses"][-20:]) == pytest.approx(fmean(seen["bf16"]["losses"][-20:]), rel=BAND)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bits_learn_as_sixteen_do(seen: dict[str, dict[str, Any]], name: str) -> None:
    assert fmean(seen[name]["losses"][-20:]) == pytest.approx(fmean(seen["bf16"]["losses"][-20:]), rel=BAND)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("bf16", ""),
        ("tensorwise", "Float8CurrentScaling"),
        ("blockwise", "Float8BlockScaling"),
        ("delayed", "TEDelayedScaling"),
    ],
)
def test_what_is_logged_as_used_is_what_ran(seen: dict[str, dict[str, Any]], name: str, recipe: str) -> None:
    ran = seen[name]
    assert f"computing on {ran['used']}" in ran["logged"]
    assert torch.cuda.get_device_name() in ran["used"]
    assert (f"fp8 {name}" if recipe else "bf16") in ran["used"]
    assert ran["recipe"] == recipe
    assert "layers transformer-engine, norms transformer-engine" in ran["used"]
    assert ran["layers"] == "megatron.core.extensions.transformer_engine"
    assert ran["attention"] == "TEDotProductAttention"
    assert ran["device"] == "cuda"
    assert ("gradient accumulation fused" in ran["used"]) == ran["in place"]
    assert ("rotary fused" in ran["used"]) == ran["fused rotation"]
    assert ("cross entropy fused" in ran["used"]) == ran["fused loss"]
    assert "ffn 768" in ran["used"]
    assert ran["width"] == 2 * 768
    assert all(module.startswith("transformer_engine") for module in ran["optimizers"])


@pytest.fixture(scope="module")
def exact() -> Iterator[Ranks]:
    """A process that only ever computes deterministically: libraries read some switches once."""
    with helpers.ranks(1) as group:
        yield group


@pytest.mark.parametrize("name", ["bf16", "tensorwise", "blockwise"])
def test_a_run_done_again_and_one_cut_short_are_bit_equal_to_the_first(
    exact: Ranks, new_run: Callable[..., Path], name: str
) -> None:
    overrides = (*MODEL, PHASES, "deterministic=true", *FORMATS[name])
    runs = [new_run(f"{name}-{which}", *overrides) for which in ("first", "again", "cut")]
    first, again = (exact.train(Order(folder)) for folder in runs[:2])
    begun = exact.train(Order(runs[2], signal_at_look=look_in_step(4)))
    rest = exact.train(Order(runs[2]))
    assert begun.stop == "TIME_LIMIT"
    assert len(begun.losses) == 4
    assert first.losses == again.losses == begun.losses + rest.losses
    assert first.digests == again.digests == begun.digests + rest.digests
    for other in (again, rest):
        assert all(np.array_equal(other.weights[key], weights) for key, weights in first.weights.items())
    saved = [rig.state_saved(rig.generation(folder, 6)) for folder in runs]
    assert saved[0] == saved[1] == saved[2]


def test_a_checkpoint_has_the_tensors_that_the_cpu_rig_saves_and_can_be_exported(
    exact: Ranks, new_run: Callable[..., Path]
) -> None:
    from crystal_hpc.convert.export import Options, export_run

    folder = new_run("exported", *MODEL, PHASES, "deterministic=true")
    exact.train(Order(folder))
    assert names_saved(rig.generation(folder, 6)) == SAVED
    assert "tensors" in export_run(folder, options=Options(verify="weights"))


def test_scales_that_live_from_step_to_step_are_refused_before_the_first_step(new_run: Callable[..., Path]) -> None:
    folder = new_run("delayed", *MODEL, PHASES)
    (ended,) = rig.run_ranks(rig.train, 1, folder, FORMATS["delayed"])  # which `prepare` would have refused
    assert isinstance(ended.error, CheckpointError)
    assert "choose tensorwise or blockwise" in str(ended.error)
    assert not list(folder.glob("metrics.jsonl"))
