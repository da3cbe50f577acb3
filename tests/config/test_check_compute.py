"""Every rule on how a run is computed, broken once; what each names would be right."""

from typing import Any

import pytest

from crystal_hpc.config import check
from crystal_hpc.config.schema import Cluster, Run

RUN: dict[str, Any] = {
    "name": "r",
    "model": {"layers": 4, "hidden": 256, "heads": 4, "ffn": 682, "vocab_size": 128},
    "data": {"tokenizer": "t", "sources": {"prose": "p"}},
    "phases": [
        {
            "name": "first",
            "sequence_length": 128,
            "batch_size": 8,
            "steps": 10,
            "mixture": {"prose": 1.0},
            "learning_rate": {"peak": 0.1},
        }
    ],
}
TENSORWISE = {"recipe": "tensorwise"}


def problems(**changes: Any) -> list[str]:
    return list(check.run_problems(Run.model_validate(RUN | changes)))


@pytest.mark.parametrize(
    "good",
    [
        {"parallel": {"tensor": 2, "sequence": True, "context": 2}},
        {"parallel": {"overlap_gradients": True, "overlap_parameters": True}},
        {"recompute": {"mode": "full", "layers": 4}},
        {"recompute": {"mode": "selective", "modules": ["core_attn", "mlp"]}},
        {"fp8": {"recipe": "delayed"}},
        {"fp8": {"recipe": "tensorwise", "bf16_first_layers": 1, "bf16_last_layers": 2}},
        {"fp8": {"recipe": "blockwise", "format": "e4m3"}, "parallel": {"tensor": 2}},
        {"kernels": {"attention": "flash"}, "deterministic": True},
    ],
)
def test_what_can_work_somewhere_is_accepted(good: dict[str, Any]) -> None:
    assert problems(**good) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel": {"sequence": True}}, "parallel.sequence: needs parallel.tensor > 1; leave it out"),
        (
            {"parallel": {"overlap_parameters": True}},
            "parallel.overlap_parameters: needs distributed_optimizer and overlap_gradients; set both to true",
        ),
        (
            {"parallel": {"context": 3}},
            "phases.0.sequence_length: 128 is not a multiple of 6, into which parallel.context = 3 and "
            "parallel.sequence cut it",
        ),
        (
            {"kernels": {"layers": "megatron", "attention": "fused"}},
            "kernels.attention: fused needs Transformer Engine, and kernels.layers is megatron",
        ),
        (
            {"kernels": {"layers": "megatron"}, "parallel": {"context": 2}},
            "parallel.context: more than 1 needs Transformer Engine, and kernels.layers is megatron",
        ),
        (
            {"kernels": {"attention": "flash"}, "precision": "fp32"},
            "kernels.attention: flash computes in 16 bits; make precision bf16",
        ),
        (
            {"kernels": {"cross_entropy": "fused"}, "deterministic": True},
            "kernels.cross_entropy: Megatron knows no deterministic fused one; leave it out",
        ),
        ({"recompute": {"layers": 2}}, "recompute.layers: is for mode: full, and the mode is none"),
        (
            {"recompute": {"mode": "full", "layers": 3}, "parallel": {"pipeline": 2}},
            "recompute.layers: 3 is more than the 2 blocks of a pipeline stage",
        ),
        (
            {"recompute": {"mode": "full", "modules": ["mlp"]}},
            "recompute.modules: is for mode: selective, and the mode is full",
        ),
        (
            {"parallel": {"context": 2}, "kernels": {"attention": "unfused"}},
            "parallel.context: more than 1 needs flash or fused attention, in bf16; unfused attention knows one piece",
        ),
        (
            {"parallel": {"context": 2}, "precision": "fp32"},
            "parallel.context: more than 1 needs flash or fused attention, in bf16; unfused attention knows one piece",
        ),
        (
            {"fp8": TENSORWISE, "precision": "fp32"},
            "fp8: what is not in 8 bits is in bf16; make precision bf16, not fp32",
        ),
        (
            {"fp8": TENSORWISE, "kernels": {"layers": "megatron"}},
            "fp8: needs Transformer Engine, and kernels.layers is megatron",
        ),
        (
            {"fp8": {"recipe": "delayed", "bf16_last_layers": 1}},
            "fp8.bf16_first_layers, bf16_last_layers: recipe: delayed scales all blocks; choose tensorwise",
        ),
        (
            {"fp8": {"recipe": "tensorwise", "bf16_first_layers": 2, "bf16_last_layers": 2}},
            "fp8: 2 + 2 blocks in bf16 do not fit 4 in stages of 4; keep fewer",
        ),
        (
            {"fp8": {"recipe": "blockwise"}, "parallel": {"tensor": 4}},
            "model.hidden: 256 is not a multiple of 512, which fp8.recipe: blockwise needs",
        ),
        (
            {"fp8": {"recipe": "blockwise"}, "parallel": {"context": 2}},
            "phases.0.sequence_length: times parallel.micro_batch it is 128, no multiple of 256, which fp8.recipe: "
            "blockwise needs",
        ),
    ],
)
def test_what_contradicts_itself_is_said(changes: dict[str, Any], expected: str) -> None:
    assert expected in problems(**changes)


def test_context_parallel_ranks_are_counted_when_a_layout_is_dealt_out() -> None:
    run = Run.model_validate(RUN | {"parallel": {"tensor": 2, "context": 2}})
    cluster = Cluster.model_validate({"name": "c", "executor": "local", "ranks_per_node": 6, "time_limit": "1h"})
    assert list(check.layout_problems(run, cluster)) == [
        "parallel: tensor x pipeline x context = 4 does not divide the 6 ranks of cluster 'c'"
    ]
