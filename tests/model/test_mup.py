"""muP by parameter: how large it starts, how fast it learns, whether it decays; and the same start on any layout.

Two real ranks build the model under each parallel layout, once for all the tests here. They are forks of one process,
which imports Megatron for both.
"""

import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.model import mup

# Sizes that two tensor- and two pipeline-parallel ranks can share.
RUN = """
name: tiny
precision: fp32
model: {layers: 4, hidden: 64, heads: 4, ffn: 84, vocab_size: 1002, init_std: 0.073}
mup: {base_hidden: 16, embedding_multiplier: 14.6, output_multiplier: 2.22}
data: {tokenizer: t, sources: {prose: a}}
parallel: {micro_batch: 2, distributed_optimizer: false}
phases:
- {name: p, sequence_length: 16, batch_size: 8, steps: 9, mixture: {prose: 1.0}, learning_rate: {peak: 0.01}}
"""
LAYOUTS = {
    "plain": [],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "untied": ["parallel.pipeline=2", "model.tied_embeddings=false"],
    "llama": ["model.norm=rmsnorm", "model.bias=false", "parallel.distributed_optimizer=true"],
}
# Standard deviation, learning rate and weight decay by the kind of a parameter: shared/facts/crystal.md, sections 1
# (init) and 2 (groups), with this model's width multiplier of 16 / 64 and its 4 layers.
STD, WIDTH, LAYERS = 0.073, 16 / 64, 4
KINDS = {
    "embedding": (STD, 1.0, 0.1),
    "matrix": (STD * math.sqrt(WIDTH), WIDTH, 0.1),
    "residual": (STD * math.sqrt(WIDTH) / math.sqrt(2 * LAYERS), WIDTH, 0.1),
    "norm or bias": (0.0, 1.0, 0.0),
}
LAYER = {
    "input_layernorm.weight": "norm or bias",
    "input_layernorm.bias": "norm or bias",
    "self_attention.linear_proj.weight": "residual",
    "self_attention.linear_proj.bias": "norm or bias",
    "self_attention.linear_qkv.weight": "matrix",
    "self_attention.linear_qkv.bias": "norm or bias",
    "pre_mlp_layernorm.weight": "norm or bias",
    "pre_mlp_layernorm.bias": "norm or bias",
    "mlp.linear_fc1.weight": "matrix",
    "mlp.linear_fc1.bias": "norm or bias",
    "mlp.linear_fc2.weight": "residual",
    "mlp.linear_fc2.bias": "norm or bias",
}
PARAMETERS = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.final_layernorm.weight": "norm or bias",
    "decoder.final_layernorm.bias": "norm or bias",
} | {f"decoder.layers.{n}.{name}": kind for n in range(LAYERS) for name, kind in LAYER.items()}
RATE = 0.01

Rank = dict[str, Any]  # a rank's `weights` by global name, and its optimizer's (rate, decay) by name in `groups`
Built = dict[str, tuple[Rank, Rank]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """What the two ranks built under each layout."""
    folder = tmp_path_factory.mktemp("mup")
    (folder / "run.yaml").write_text(RUN)
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)) for name in LAYOUTS}


@pytest.fixture(scope="module")
def weights(built: Built) -> dict[str, torch.Tensor]:
    """The whole model, as one rank holds it."""
    found: dict[str, torch.Tensor] = built["plain"][0]["weights"]
    return found


def test_the_model_has_the_parameters_that_are_expected(weights: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == PARAMETERS.keys()


def test_weights_start_at_their_roles_size_and_are_cut_at_two_deviations(weights: dict[str, torch.Tensor]) -> None:
    # What is left of a normal distribution of deviation one, cut at two on either side (see truncnorm in any table).
    left = 0.8796
    for name, kind in PARAMETERS.items():
        std, tensor = KINDS[kind][0], weights[name]
        if std == 0:
            assert (tensor == float("norm" in name and name.endswith("weight"))).all(), name
            continue
        error = 1 / math.sqrt(tensor.numel())
        assert tensor.std().item() == pytest.approx(left * std, rel=4 * error), name
        assert abs(tensor.mean().item()) < 4 * std * error, name
        assert 1.9 * std < tensor.abs().max().item() <= 2 * std * (1 + 1e-6), name


def test_no_two_weights_start_alike(weights: dict[str, torch.Tensor]) -> None:
    starts = [tuple(weights[name].flatten()[:4].div(KINDS[kind][0]).tolist()) for name, kind in random_parameters()]
    assert len(set(starts)) == len(starts)


def random_parameters() -> list[tuple[str, str]]:
    return [(name, kind) for name, kind in PARAMETERS.items() if KINDS[kind][0]]


def test_learning_rate_and_weight_decay_are_those_of_the_table(built: Built) -> None:
    groups = built["plain"][0]["groups"]
    assert groups.keys() == PARAMETERS.keys()
    for name, (rate, decay) in groups.items():
        _, multiplier, expected_decay = KINDS[PARAMETERS[name]]
        assert (rate, decay) == (pytest.approx(RATE * multiplier), pytest.approx(expected_decay)), name


def test_every_layout_groups_its_parameters_alike(built: Built) -> None:
    whole = built["plain"][0]["groups"]
    for layout in ("tensor", "pipeline"):
        for rank in built[layout]:
            for name, group in rank["groups"].items():
                assert group == whole[name.replace("output_layer", "embedding.word_embeddings")], (layout, name)


def test_data_parallel_ranks_start_from_the_same_weights(built: Built, weights: dict[str, torch.Tensor]) -> None:
    other = built["plain"][1]["weights"]
    assert all(torch.equal(other[name], tensor) for name, tensor in weights.items())


def test_tensor_parallel_shards_make_up_the_same_weights(built: Built, weights: dict[str, torch.Tensor]) -> None:
    first, second = (rank["weights"] for rank in built["tensor"])
    for name, tensor in weights.items():
        one, other = first[name], second[name]
        if one.shape == tensor.shape:
            whole = one
            assert torch.equal(one, other), name
        elif "linear_fc1" in name:  # gate and value, each shared out
            whole = torch.cat([one.chunk(2)[0], other.chunk(2)[0], one.chunk(2)[1], other.chunk(2)[1]])
        else:
            whole = torch.cat([one, other], dim=int(one.shape[0] == tensor.shape[0]))
        assert torch.equal(whole, tensor), name


def test_pipeline_stages_make_up_the_same_weights(built: Built, weights: dict[str, torch.Tensor]) -> None:
    first, second = (rank["weights"] for rank in built["pipeline"])
    assert first.keys() & second.keys() == set()
    together = first | second
    head = together.pop("output_layer.weight")
    assert together.keys() == weights.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in weights.items())
    assert torch.equal(head, weights["embedding.word_embeddings.weight"]), "the tied head starts as another tensor"


def test_an_untied_head_starts_at_the_embeddings_size_but_as_another_tensor(built: Built) -> None:
    embedding = built["untied"][0]["weights"]["embedding.word_embeddings.weight"]
    head = built["untied"][1]["weights"]["output_layer.weight"]
    assert head.shape == embedding.shape
    assert head.std().item() == pytest.approx(embedding.std().item(), rel=0.05)
    assert not torch.equal(head, embedding)


def test_a_model_without_biases_and_centred_norms_has_roles_too(built: Built) -> None:
    found = built["llama"][0]["weights"]
    assert found.keys() == {name for name in PARAMETERS if not name.endswith(".bias")}
    assert all((found[name] == 1).all() for name in found if "norm" in name)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        # Transformer Engine's fused layers, which no CPU can build.
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "one"),
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_bias", "zero"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "one"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_bias", "zero"),
        ("module.module.decoder.layers.3.mlp.linear_fc2.weight", "residual"),
        ("output_layer.weight", "embedding"),
        ("output_layer.bias", "zero"),
    ],
)
def test_a_role_is_told_by_the_end_of_a_name(name: str, role: str) -> None:
    assert mup.role(name) == role


def test_a_parameter_without_a_role_is_never_left_as_it_is() -> None:
    with pytest.raises(AssertionError, match="no role for parameter decoder.layers.0.mlp.router.weight"):
        mup.role("decoder.layers.0.mlp.router.weight")


def test_without_mup_all_parameters_learn_at_one_rate(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    run = load_run(tmp_path / "run.yaml", ["mup=null"])
    assert {mup.learning_rate_multiplier(run, name) for name in PARAMETERS} == {1.0}
    assert {mup.weight_decay_multiplier(name) for name in PARAMETERS} == {0.0, 1.0}


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 50), more=st.integers(1, 50), columns=st.integers(1, 20), key=st.integers(0, 2**63 - 1))
def test_more_rows_leave_the_first_ones_as_they_were(rows: int, more: int, columns: int, key: int) -> None:
    tensor = mup.truncated_normal([rows, columns], 0.5, key)
    assert tensor.dtype == torch.float32
    assert torch.equal(mup.truncated_normal([rows + more, columns], 0.5, key)[:rows], tensor)


def test_the_initial_weights_can_never_silently_change() -> None:
    """Known answers. A change here changes where every run starts."""
    found = mup.truncated_normal([5], 1.0, 42)
    torch.testing.assert_close(found, torch.tensor(KNOWN), rtol=0, atol=2e-6)


KNOWN = [-0.492223, 0.861901, -0.335316, -0.829591, 1.401914]


def work(rank: int, folder: Path) -> None:
    """What one of the two ranks does."""
    for name, overrides in LAYOUTS.items():
        result = build(load_run(folder / "run.yaml", overrides), rank, folder / f"{name}.store")
        torch.save(result, folder / f"{name}-{rank}.pt")


def build(run: Run, rank: int, meeting: Path) -> Rank:
    """This rank's part of the model and of the optimizer."""
    from crystal_hpc.model import parallel
    from crystal_hpc.model.names import global_name
    from crystal_hpc.train import optim, sharding, step

    layout = parallel.start(run, rank, 2, rank, meeting)
    trainer = step.build_trainer(run, layout)
    module: Any = sharding.module(trainer)
    optim.set_learning_rate(trainer.optimizer, RATE, run)
    names = {parameter: global_name(module, name) for name, parameter in module.named_parameters()}
    groups = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in ([] if run.parallel.distributed_optimizer else trainer.optimizer.param_groups)
        for parameter in group["params"]
    }
    parallel.stop()
    return {"weights": {name: parameter.detach().clone() for parameter, name in names.items()}, "groups": groups}


if __name__ == "__main__":
    import crystal_hpc.train.step  # noqa: F401 (before the fork)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, Path(sys.argv[1]))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
