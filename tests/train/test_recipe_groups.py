"""Every parameter of configs/crystal-7b.yaml, by the name that Megatron gives it, starts and learns as published.

Megatron builds all 32 layers at a width of 64, with the base width of muP made smaller by as much, so that every
multiplier and every deviation is that of the whole model. The published table is that of the code that trained Crystal
(github.com/Cerebras/modelzoo, release 1.9.1: get_adaptive_lr_layers, should_apply_weight_decay) and its params.yaml.
LLM360's Megatron version of the model scales the biases of linear layers, too; the code that trained it did not.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import join, run_ranks, values

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.convert.formats import by_name
from crystal_hpc.convert.names import Shape
from crystal_hpc.model import mup

CONFIG = Path(__file__).parents[2] / "configs/crystal-7b.yaml"
NARROW = (
    "model.hidden=64", "model.heads=4", "model.ffn=170", "model.vocab_size=1001", "mup.base_hidden=4", "precision=fp32",
    "parallel.distributed_optimizer=false", "parallel.overlap_gradients=false", "parallel.overlap_parameters=false",
)  # fmt: skip
PEAK = 0.012

# Name -> learning rate as a multiple of the schedule's, weight decay, initial deviation (None: ones or zeros).
TABLE = {
    r"embedding\.word_embeddings\.weight": (1.0, 0.1, 0.073),
    r".*\.linear_(qkv|fc1)\.weight": (0.0625, 0.1, 0.01825),
    r".*\.linear_(proj|fc2)\.weight": (0.0625, 0.1, 0.00228125),
    r".*\.linear_(qkv|proj|fc1|fc2)\.bias": (1.0, 0.0, None),
    r".*layer_?norm[._](weight|bias)": (1.0, 0.0, None),
}
IN_A_LAYER = {
    *(f"self_attention.linear_{name}.{kind}" for name in ("qkv", "proj") for kind in ("weight", "bias")),
    *(f"mlp.linear_{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")),
    *(f"{name}_layernorm.{kind}" for name in ("input", "pre_mlp") for kind in ("weight", "bias")),
}
NAMES = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "decoder.final_layernorm.bias"}
NAMES |= {f"decoder.layers.{n}.{name}" for n in range(32) for name in IN_A_LAYER}

Built = dict[str, tuple[float, float, torch.Tensor]]


def published(name: str) -> tuple[float, float, float | None]:
    """The one line of the table that a name has."""
    (found,) = [cells for pattern, cells in TABLE.items() if re.fullmatch(pattern, name)]
    return found


def build(rank: int, size: int, meeting: str, folder: Path) -> Any:
    """The rate and the decay that the optimizer has for each parameter, and where the parameter starts."""
    from crystal_hpc.train import optim, sharding

    trainer = join(rank, size, f"{meeting}-{folder.name}", folder, NARROW)
    optim.set_learning_rate(trainer.optimizer, PEAK, trainer.run)
    names = {parameter: name for name, parameter in sharding.module(trainer).named_parameters()}
    return {
        names[parameter]: (group["lr"] / PEAK, group["weight_decay"], parameter.detach().numpy())
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.fixture(scope="module")
def crystal() -> Run:
    return load_run(CONFIG)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("crystal-7b")
    (folder / "run.yaml").write_text(CONFIG.read_text())
    (found,) = values(run_ranks(build, 1, folder))
    return {name: (rate, decay, torch.from_numpy(tensor)) for name, (rate, decay, tensor) in found.items()}


def test_the_optimizer_has_every_parameter_with_the_published_rate_and_decay(built: Built) -> None:
    assert built.keys() == NAMES
    for name, (rate, decay, _) in built.items():
        assert (rate, decay) == (pytest.approx(published(name)[0]), pytest.approx(published(name)[1])), name


def test_so_has_the_model_with_transformer_engines_names(crystal: Run) -> None:
    entries = by_name("crystalcoder").entries(Shape(crystal.model, crystal.mup))
    assert len(entries) == len(NAMES)
    for name in (entry.megatron for entry in entries):
        rate, decay, _ = published(name)
        assert mup.learning_rate_multiplier(crystal, name) == rate, name
        assert mup.weight_decay_multiplier(name) * crystal.optimizer.weight_decay == decay, name


def test_biases_of_linear_layers_learn_at_the_whole_rate(built: Built) -> None:
    rates = [rate for name, (rate, _, _) in built.items() if re.search(r"linear_\w+\.bias$", name)]
    assert rates == pytest.approx([1.0] * 32 * 4)


def test_weights_start_from_normal_distributions_of_the_published_deviation_cut_at_two(built: Built) -> None:
    pooled: dict[float, list[torch.Tensor]] = {}
    for name, (_, _, tensor) in built.items():
        std = published(name)[2]
        if std is None:
            assert (tensor == float("norm" in name and name.endswith("weight"))).all(), name
        else:
            pooled.setdefault(std, []).append(tensor.flatten() / std)
    assert sorted(pooled) == [0.00228125, 0.01825, 0.073]
    for std, parts in pooled.items():
        found = torch.cat(parts)
        error = 1 / math.sqrt(found.numel())
        assert 1.999 < found.abs().max().item() <= 2.0001, std
        assert found.mean().item() == pytest.approx(0, abs=4 * error), std
        # Of a normal distribution cut at two: its deviation, and the shares within a half, one and one and a half.
        assert found.std().item() == pytest.approx(0.87963, rel=4 * error), std
        for within in (0.5, 1.0, 1.5):
            share = math.erf(within / math.sqrt(2)) / math.erf(2 / math.sqrt(2))
            assert (found.abs() < within).float().mean().item() == pytest.approx(share, abs=4 * error), (std, within)
