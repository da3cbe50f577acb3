"""The tensors of a checkpoint, by name: the same ones whichever layers computed, the CPU rig's or a GPU's."""

import re
from collections.abc import Callable
from pathlib import Path

import rig
from ranks import Order, Ranks

from crystal_hpc.train.distcp import Reader

WEIGHTS = {
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "decoder.final_layernorm.bias",
    *(
        f"decoder.layers.{part}.{kind}"
        for part in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        for kind in ("weight", "bias")
    ),
    *(
        f"decoder.layers.{part}.layer_norm_{kind}"
        for part in ("self_attention.linear_qkv", "mlp.linear_fc1")
        for kind in ("weight", "bias")
    ),
}
SAVED = WEIGHTS | {
    f"optimizer.state.{state}.{name}" for state in ("exp_avg", "exp_avg_sq", "fp32_param") for name in WEIGHTS
}
"""Of a model in bfloat16 with tied embeddings, without the numbers that Megatron-core 0.19 gives the layers."""


def names_saved(folder: Path) -> set[str]:
    return {re.sub(r"\.layers\.\d+\.", ".layers.", name) for name in Reader(folder).tensors}


def test_the_cpu_rig_saves_these_tensors(one: Ranks, new_run: Callable[..., Path]) -> None:
    folder = new_run("names", "precision=bf16", *rig.SHORT)
    one.train(Order(folder))
    assert names_saved(rig.generation(folder, 4)) == SAVED
