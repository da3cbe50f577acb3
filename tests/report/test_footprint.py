"""The memory of each GPU as `crystal plan` tells it."""

from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config import derive, memory
from crystal_hpc.config.devices import GIB
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.report.footprint import describe_memory

DEMO = Path(__file__).parents[2] / "configs" / "crystal-demo.yaml"
SEVEN_B = (
    "precision=bf16",
    "model={layers: 32, hidden: 4096, heads: 32, ffn: 10922, vocab_size: 32032}",
    "phases=[{name: one, sequence_length: 2048, batch_size: 2112, steps: 1, mixture: {prose: 1.0}, "
    "learning_rate: {peak: 0.1}}]",
)


def seven_b(*overrides: str) -> Run:
    """Crystal's shape."""
    return load_run(DEMO, (*SEVEN_B, *overrides))


def cluster(**more: Any) -> Cluster:
    slurm = {"executor": "slurm", "nodes": 4, "ranks_per_node": 8, "time_limit": "24h"}
    return Cluster.model_validate({"name": "big", **slurm, **more})


def stages(run: Run, ranks: int = 32) -> list[memory.StageMemory]:
    return memory.stages(run, run.phases[0], ranks)


def test_the_stages_together_have_the_parameters_of_the_model() -> None:
    whole = derive.parameters(seven_b().model)
    table = 32032 * 4096
    for pipeline, copies in ((1, 0), (4, 1)):
        run = seven_b(f"parallel.pipeline={pipeline}")
        assert sum(memory.weights(run, stage) for stage in range(pipeline)) == whole + copies * table
    untied = seven_b("model.tied_embeddings=false", "parallel.pipeline=4")
    assert sum(memory.weights(untied, stage) for stage in range(4)) == derive.parameters(untied.model)


def test_weights_gradients_and_state_take_their_bytes_a_parameter() -> None:
    count = derive.parameters(seven_b("model.ffn=11008").model)  # on a GPU the width is padded to a multiple of 128
    (plain,) = stages(seven_b("parallel.distributed_optimizer=false"))
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * count, 4 * count, 12 * count)
    (shared,) = stages(seven_b())
    assert shared.optimizer == -(-12 * count // 32)
    (exact,) = stages(seven_b("precision=fp32", "parallel.distributed_optimizer=false"))
    assert (exact.weights, exact.gradients, exact.optimizer) == (4 * count, 4 * count, 8 * count)


def test_the_first_stage_holds_the_most_micro_batches_but_no_more_than_there_are() -> None:
    assert [stage.in_flight for stage in stages(seven_b("parallel.pipeline=4"))] == [4, 3, 2, 1]
    few = seven_b("parallel.pipeline=4", "phases.one.batch_size=64", "parallel.micro_batch=4")
    assert [stage.in_flight for stage in stages(few)] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "saving",
    [
        ("recompute.mode=full",),
        ("recompute={mode: full, layers: 16}",),
        ("recompute={mode: selective, modules: [mlp]}",),
        ("parallel.tensor=2",),
        ("parallel={tensor: 2, sequence: true, micro_batch: 8}",),
        ("parallel={context: 2, micro_batch: 8}",),
        ("fp8={recipe: tensorwise}",),
        ("parallel.micro_batch=4",),
    ],
)
def test_what_is_meant_to_save_activations_does(saving: tuple[str, ...]) -> None:
    (base,), (less,) = stages(seven_b()), stages(seven_b(*saving))
    assert 0 < less.activations < base.activations


def test_what_is_kept_of_a_fully_recomputed_block_is_its_input() -> None:
    tokens, hidden = 8 * 2048, 4096
    (full,), (none,) = stages(seven_b("recompute.mode=full")), stages(seven_b())
    ends = tokens * (8 + 2 * 2 * hidden + 2 * 4 + 2 * 32032)  # ids; last norm; logits
    assert full.activations == 32 * tokens * hidden * 2 + ends
    assert (none.activations - ends) % 32 == 0
    assert full.working - none.working >= 0, "the block that is recomputed is there once"


def test_scores_of_all_pairs_of_tokens_are_kept_by_megatrons_layers_unless_recomputed() -> None:
    megatron = "kernels.layers=megatron"
    (kept,) = stages(seven_b(megatron))
    (again,) = stages(seven_b(megatron, "recompute.mode=selective"))
    assert kept.activations - again.activations == 32 * 32 * 8 * 2048**2 * 6
    assert again.working - kept.working == 32 * 8 * 2048**2 * 6


def test_float32_leaves_unfused_attention_alone_which_keeps_its_scores() -> None:
    ways = "precision=fp32", "precision=fp32 kernels.attention=unfused"
    assert stages(seven_b(*ways[0].split())) == stages(seven_b(*ways[1].split()))


def test_eight_bit_weights_are_kept_twice_beside_those_in_bfloat16() -> None:
    (base,) = stages(seven_b())
    (eight,) = stages(seven_b("fp8={recipe: tensorwise, bf16_first_layers: 1, bf16_last_layers: 1}"))
    matrices = 4 * 4096**2 + 3 * 4096 * 11008
    assert eight.weights - base.weights == 2 * 30 * matrices
    assert eight.optimizer == base.optimizer


def test_the_text_has_a_line_for_each_stage_and_names_the_largest() -> None:
    run = seven_b("parallel.pipeline=4", "parallel.tensor=2")
    lines = describe_memory(run, cluster()).splitlines()
    assert lines[0].startswith("memory of each GPU: 32 ranks (TP 2 x PP 4 x DP 4), bf16, micro-batches of 8 x 2,048")
    first = stages(run)[0]
    assert [line.split()[:2] for line in lines[2:6]] == [["0", "4"], ["1", "3"], ["2", "2"], ["3", "1"]]
    assert lines[2].split()[-1] == f"{first.total / GIB:.2f}"
    assert lines[6].startswith(f"largest: stage 0, {first.total / GIB:.2f} GiB; with an allowance of ")
    assert "of 80" not in lines[6] and "does not fit" not in describe_memory(run, cluster())
    assert max(map(len, lines)) <= 110


def test_a_run_that_does_not_fit_the_clusters_gpus_is_told_so() -> None:
    run = seven_b("parallel.micro_batch=2", "parallel.distributed_optimizer=false")
    assert "note  does not fit: h100-sxm, the GPU of cluster 'big', has 80.00 GiB" in describe_memory(
        run, cluster(gpu="h100-sxm")
    )
    assert "does not fit" not in describe_memory(run, cluster(gpu="gb200"))


def test_recomputation_that_saves_nothing_is_pointed_out() -> None:
    said = "core_attn takes time and saves nothing here"
    assert said in describe_memory(seven_b("recompute.mode=selective"))
    assert said not in describe_memory(seven_b("recompute.mode=selective", "kernels.attention=unfused"))
    assert said not in describe_memory(seven_b("recompute={mode: selective, modules: [mlp]}"))


def test_without_a_cluster_one_data_parallel_rank_has_the_whole_state() -> None:
    assert "1 rank (DP 1)" in describe_memory(seven_b())
    assert "4 ranks (TP 2 x PP 2 x DP 1)" in describe_memory(seven_b("parallel.tensor=2", "parallel.pipeline=2"))


def test_the_phase_that_takes_most_is_the_one_that_counts() -> None:
    assert "micro-batches of 8 x 512 tokens" in describe_memory(load_run(DEMO, ("phases.code.sequence_length=512",)))
