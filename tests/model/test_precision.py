"""What a config asks of number formats and kernels, against made-up machines: what is used, what Megatron is told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import BackendError
from crystal_hpc.model import backend, gpt, precision
from crystal_hpc.model.machine import Machine

with backend.quiet():
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

CONFIG = Path(__file__).parents[2] / "configs" / "crystal-7b.yaml"
H100 = Machine(gpu="NVIDIA H100 80GB HBM3", capability=(9, 0), cuda=(13, 0), transformer_engine=(2, 20), triton=True)
BARE_H100 = replace(H100, transformer_engine=(), triton=False)
NO_GPU = Machine()


def run(*overrides: str) -> Run:
    return load_run(CONFIG, overrides)


def told(machine: Machine, *overrides: str) -> dict[str, Any]:
    """Megatron's options of a run on a machine, which both versions of its TransformerConfig accept."""
    options = gpt.transformer_options(run(*overrides), machine)
    # Only this one option makes it look for Transformer Engine at once.
    with backend.quiet():
        TransformerConfig(**{**options, "apply_rope_fusion": False})
    return options


FP8 = {"fp8": "hybrid", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max", "first_last_layers_bf16": False}
OPTIONS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "fp8": None}),
    (("precision=fp32",), {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}),
    (("fp8.recipe=delayed",), {**FP8, "fp8_recipe": "delayed"}),
    (("fp8.recipe=tensorwise",), {**FP8, "fp8_recipe": "tensorwise"}),
    (("fp8={recipe: blockwise, format: e4m3}",), {**FP8, "fp8_recipe": "blockwise", "fp8": "e4m3"}),
    (
        ("fp8={recipe: tensorwise, bf16_first_layers: 1, bf16_last_layers: 2}",),
        {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2},
    ),
    (("recompute.mode=selective",), {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    (
        ("recompute={mode: selective, modules: [core_attn, mlp]}",),
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ),
    (
        ("recompute.mode=full", "parallel.pipeline=4"),
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 8},
    ),
    (("recompute={mode: full, layers: 4}",), {"recompute_granularity": "full", "recompute_num_layers": 4}),
    (
        ("parallel.tensor=2", "parallel.sequence=true"),
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "ffn_hidden_size": 11008},
    ),
    (("parallel.context=2",), {"context_parallel_size": 2}),
    (("parallel.pipeline=4",), {"pipeline_model_parallel_size": 4}),
    (("deterministic=true",), {"deterministic_mode": True, "cross_entropy_loss_fusion": False}),
    (("kernels.attention=flash",), {"attention_backend": AttnBackend.flash}),
    (("kernels.attention=fused",), {"attention_backend": AttnBackend.fused}),
    (("kernels.attention=unfused",), {"attention_backend": AttnBackend.unfused}),
    (("kernels.rotary=unfused",), {"apply_rope_fusion": False}),
    (("kernels.rotary=fused",), {"apply_rope_fusion": True}),
    (("kernels.activation=unfused",), {"bias_activation_fusion": False, "bias_dropout_fusion": False}),
    (("kernels.activation=fused",), {"bias_activation_fusion": True, "bias_dropout_fusion": True}),
    (("kernels.cross_entropy=unfused",), {"cross_entropy_loss_fusion": False, "cross_entropy_fusion_impl": "native"}),
    (("kernels.cross_entropy=fused",), {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}),
    (("kernels.gradient_accumulation=unfused",), {"gradient_accumulation_fusion": False}),
]


@pytest.mark.parametrize(("overrides", "expected"), OPTIONS, ids=lambda value: " ".join(value) or "as it is")
def test_every_switch_reaches_megatron(overrides: tuple[str, ...], expected: dict[str, Any]) -> None:
    machine = replace(H100, flash_attention=True)
    options = told(machine, *overrides)
    assert {name: options.get(name) for name in expected} == expected


def test_auto_takes_the_best_that_the_machine_has() -> None:
    engine = precision.choose(run(), H100)
    assert engine.line() == (
        "NVIDIA H100 80GB HBM3: bf16; layers transformer-engine, norms transformer-engine, attention auto, "
        "rotary fused, activation fused, cross entropy fused, gradient accumulation fused in blocks, ffn 11008, "
        "recompute none"
    )
    assert precision.choose(run(), replace(H100, fused_gradients=True)).gradient_accumulation == "fused"
    assert precision.choose(run(), replace(H100, transformer_engine=(2, 2))).rotary == "unfused", "interleaved pairs"
    bare = precision.choose(run(), replace(BARE_H100, apex=True))
    assert (bare.layers, bare.norms, bare.attention, bare.rotary) == ("megatron", "apex", "unfused", "unfused")
    assert precision.choose(run("model.norm=rmsnorm"), replace(BARE_H100, apex=True)).norms == "torch"
    rig = precision.choose(run(), NO_GPU)
    assert (rig.device, rig.layers, rig.norms, rig.activation, rig.ffn) == (
        *("CPU rig", "megatron", "torch", "unfused"), 10922,
    )  # fmt: skip


def test_the_line_says_which_blocks_are_not_in_8_bits() -> None:
    used = precision.choose(
        run("fp8={recipe: blockwise, format: e4m3, bf16_last_layers: 2}", "deterministic=true"), H100
    )
    assert used.line().startswith("NVIDIA H100 80GB HBM3: fp8 blockwise e4m3 (bf16: last 2 blocks); layers")
    assert used.line().endswith("recompute none, deterministic")


@pytest.mark.parametrize(
    ("machine", "overrides", "named"),
    [
        (
            NO_GPU,
            "fp8.recipe=tensorwise",
            "this machine, which has no GPU, lacks: Transformer Engine for fp8",
        ),
        (NO_GPU, "parallel.context=2", "Transformer Engine for parallel.context: 2"),
        (NO_GPU, "kernels.activation=fused", "Triton and a C compiler on a GPU for kernels.activation: fused"),
        (NO_GPU, "kernels.cross_entropy=fused", "Transformer Engine for kernels.cross_entropy: fused"),
        (BARE_H100, "kernels.layers=transformer-engine", "kernels.layers: transformer-engine (it is not installed)"),
        (BARE_H100, "kernels.attention=flash", "Transformer Engine for kernels.attention: flash"),
        (BARE_H100, "kernels.rotary=fused", "Transformer Engine for kernels.rotary: fused"),
        (BARE_H100, "kernels.gradient_accumulation=fused", "Transformer Engine, or apex's CUDA extensions"),
        (H100, "kernels.attention=flash", "NVIDIA H100 80GB HBM3 lacks: the flash-attn package"),
        (replace(H100, transformer_engine=(2, 2)), "kernels.rotary=fused", "Transformer Engine 2.3 for kernels.rotary"),
        (replace(H100, capability=(8, 0)), "fp8.recipe=tensorwise", "8.9"),
        (replace(H100, capability=(8, 9)), "fp8.recipe=blockwise", "9.0"),
        (replace(H100, cuda=(12, 4)), "fp8.recipe=blockwise", "12.9"),
        (replace(H100, transformer_engine=(2, 1)), "fp8.recipe=tensorwise", "2.2"),
        (replace(H100, false_apex="/x/apex"), "precision=bf16", "NVIDIA's apex: the package of that name in /x/apex"),
    ],
)
def test_what_is_asked_for_and_missing_is_named(machine: Machine, overrides: str, named: str) -> None:
    with pytest.raises(BackendError) as raised:
        precision.choose(run(overrides), machine)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(BackendError, match=r"Engine for kernels\.rotary.*; Triton and .* kernels\.activation"):
        precision.choose(run("kernels={rotary: fused, activation: fused}"), NO_GPU)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without the variables that `prepare_process` sets; what it has set is undone."""
    names = (*precision.DETERMINISTIC, *precision.ATTENTION_VARIABLES, "CUDA_DEVICE_MAX_CONNECTIONS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def test_a_deterministic_run_sets_what_it_needs_and_refuses_what_contradicts_it(
    environment: pytest.MonkeyPatch,
) -> None:
    precision.prepare_process(run("deterministic=true"))
    assert torch.are_deterministic_algorithms_enabled()
    assert {name: os.environ[name] for name in precision.DETERMINISTIC} == {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
    }
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    precision.prepare_process(run("deterministic=true"))
    for name, wrong in (
        *(("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")),
    ):
        environment.setenv(name, wrong)
        with pytest.raises(BackendError, match=f"{name}: is {wrong}, and deterministic: true needs .*; leave it out"):
            precision.prepare_process(run("deterministic=true"))
        environment.delenv(name)


def test_variables_that_would_choose_another_attention_are_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(BackendError, match="NVTE_FUSED_ATTN: is 0; leave it out and set kernels.attention instead"):
        precision.prepare_process(run("kernels.attention=fused"))
    precision.prepare_process(run("kernels.attention=flash"))


def test_tensor_parallel_ranks_start_their_kernels_in_order(environment: pytest.MonkeyPatch) -> None:
    precision.prepare_process(run())
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    precision.prepare_process(run("parallel.tensor=2"))
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_a_package_that_is_only_called_apex_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "apex"
    folder.mkdir()
    (folder / "__init__.py").touch()
    look = "from crystal_hpc.model.machine import find_apex; print(find_apex())"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def found() -> str:
        return subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.strip()

    assert found() == f"(False, '{folder}')"
    (folder / "multi_tensor_apply").mkdir()
    assert found() == "(False, '')", "NVIDIA's, without its CUDA extensions"
