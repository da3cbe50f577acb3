"""Number formats and kernels: what a config asks for, what the machine has, and so what is used.

`choose` decides once, before the model is built; `gpt` and `train.step` only obey. What is used is logged and goes into
the journal (`Used.line`). Asking for what the machine lacks is an error that names everything that is missing: a run
must not quietly be computed in another way than its config says.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from crystal_hpc.config import memory
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import BackendError
from crystal_hpc.model import backend
from crystal_hpc.model.machine import Machine

with backend.quiet():
    from megatron.core.transformer import MegatronModule
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.module import Float16Module

AMAX_HISTORY = 1024
"""Steps over which delayed scaling looks back, and it takes their largest value: Transformer Engine's defaults."""
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")

DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree"),
}
"""Variables without which the same bits do not come twice, and what they may be, the first unless told otherwise:
Transformer Engine's, cuBLAS's (its manual, section 2.1.4) and NCCL's."""


@dataclass(frozen=True)
class Used:
    """How a run is computed on a machine; each choice in the config's words."""

    device: str
    formats: str
    """Of the matrix products: `fp32`, `bf16`, or `fp8 tensorwise hybrid (bf16: first 1, last 2 blocks)`."""
    layers: str
    norms: str
    """`transformer-engine`, `apex` or `torch`."""
    attention: str
    """`auto`: Transformer Engine chooses for each shape."""
    rotary: str
    activation: str
    cross_entropy: str
    gradient_accumulation: str
    """`fused`, `fused in blocks` (not in the output head, where Megatron needs apex) or `unfused`."""
    ffn: int
    """The feed-forward width in memory, zeros included."""
    recompute: str
    deterministic: bool

    def line(self) -> str:
        """All of it on one line."""
        kernels = ("layers", "norms", "attention", "rotary", "activation", "cross_entropy", "gradient_accumulation")
        said = [f"{name.replace('_', ' ')} {getattr(self, name)}" for name in kernels]
        said += [f"ffn {self.ffn}", f"recompute {self.recompute}"] + ["deterministic"] * self.deterministic
        return f"{self.device}: {self.formats}; {', '.join(said)}"


def choose(run: Run, machine: Machine) -> Used:
    """What is used of what there is. Raises BackendError, in one line, with all that is asked for and missing."""
    kernels, missing = run.kernels, _missing(run, machine)
    if missing:
        raise BackendError(f"{machine.gpu or 'this machine, which has no GPU,'} lacks: {'; '.join(missing)}")
    engine = _uses_engine(run, machine)
    plain_norm = "apex" if machine.apex and run.model.norm == "layernorm" and machine.gpu else "torch"
    rotary = engine and (not run.model.rotary_interleaved or machine.transformer_engine >= (2, 3))
    gradients = "fused" if machine.fused_gradients else "fused in blocks" if engine else "unfused"
    return Used(
        device=machine.gpu or "CPU rig",
        formats=_formats_in_words(run),
        layers="transformer-engine" if engine else "megatron",
        norms="transformer-engine" if engine else plain_norm,
        attention=kernels.attention if engine else "unfused",
        rotary=_picked(kernels.rotary, rotary),
        activation=_picked(kernels.activation, machine.triton),
        cross_entropy=_picked(kernels.cross_entropy, engine and machine.triton and not run.deterministic),
        gradient_accumulation="unfused" if kernels.gradient_accumulation == "unfused" else gradients,
        ffn=memory.padded_ffn(run, bool(machine.gpu)),
        recompute=_recompute_in_words(run),
        deterministic=run.deterministic,
    )


def _uses_engine(run: Run, machine: Machine) -> bool:
    return bool(machine.transformer_engine) and run.kernels.layers != "megatron"


def _picked(asked: str, possible: bool) -> str:
    return asked if asked != "auto" else "fused" if possible else "unfused"


def _formats_in_words(run: Run) -> str:
    if not run.fp8:
        return run.precision
    ends = {"first": run.fp8.bf16_first_layers, "last": run.fp8.bf16_last_layers}
    kept = ", ".join(f"{end} {count}" for end, count in ends.items() if count)
    return f"fp8 {run.fp8.recipe} {run.fp8.format}" + (f" (bf16: {kept} blocks)" if kept else "")


def _recompute_in_words(run: Run) -> str:
    recompute = run.recompute
    detail = {"none": "", "selective": f" ({', '.join(recompute.modules)})", "full": f" ({recompute.layers or 'all'})"}
    return recompute.mode + detail[recompute.mode]


def _missing(run: Run, machine: Machine) -> list[str]:
    """What a run asks for and a machine lacks, one clause each."""
    kernels, missing = run.kernels, []
    if machine.false_apex:
        missing.append(
            f"NVIDIA's apex: the package of that name in {machine.false_apex} is another one, which Megatron would "
            "take for it (pip uninstall apex)"
        )
    if not machine.transformer_engine:
        why = machine.why_no_transformer_engine if machine.gpu else "it needs a GPU"
        asks = {
            "kernels.layers: transformer-engine": kernels.layers == "transformer-engine",
            f"kernels.attention: {kernels.attention}": kernels.attention in ("flash", "fused"),
            "kernels.rotary: fused": kernels.rotary == "fused",
            "kernels.cross_entropy: fused": kernels.cross_entropy == "fused",
            "fp8": run.fp8 is not None,
            f"parallel.context: {run.parallel.context}": run.parallel.context > 1,
        }
        missing += [f"Transformer Engine for {key} ({why})" for key, asked in asks.items() if asked]
    elif kernels.rotary == "fused" and run.model.rotary_interleaved and machine.transformer_engine < (2, 3):
        missing.append("Transformer Engine 2.3 for kernels.rotary: fused of interleaved pairs")
    if machine.transformer_engine and kernels.attention == "flash" and not machine.flash_attention:
        missing.append("the flash-attn package for kernels.attention: flash")
    for key in ("activation", "cross_entropy"):
        if getattr(kernels, key) == "fused" and not machine.triton:
            missing.append(f"Triton and a C compiler on a GPU for kernels.{key}: fused")
    if kernels.gradient_accumulation == "fused" and not (_uses_engine(run, machine) or machine.fused_gradients):
        missing.append("Transformer Engine, or apex's CUDA extensions, for kernels.gradient_accumulation: fused")
    if run.fp8 and machine.gpu:
        missing += _missing_for_fp8(run.fp8.recipe, machine)
    return missing


def _missing_for_fp8(recipe: str, machine: Machine) -> list[str]:
    # Transformer Engine's own conditions: transformer_engine.pytorch.quantization.check_recipe_support
    needs = {"delayed": ((8, 9), (12, 1)), "tensorwise": ((8, 9), (12, 1)), "blockwise": ((9, 0), (12, 9))}
    capability, cuda = needs[recipe]
    missing = []
    if machine.capability < capability:
        has = ".".join(map(str, machine.capability))
        missing.append(f"compute capability {'.'.join(map(str, capability))} for fp8.recipe: {recipe} (it has {has})")
    if machine.cuda < cuda:
        has = ".".join(map(str, machine.cuda))
        missing.append(f"CUDA {'.'.join(map(str, cuda))} for fp8.recipe: {recipe} (torch has {has})")
    oldest = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}[recipe]  # megatron.core.fp8_utils
    if machine.transformer_engine and machine.transformer_engine < oldest:
        missing.append(f"Transformer Engine {'.'.join(map(str, oldest))} for fp8.recipe: {recipe}")
    return missing


def dtype(run: Run) -> torch.dtype:
    """The format of activations and of the weights used in the forward pass."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[run.precision]


def transformer_options(run: Run, used: Used, machine: Machine) -> dict[str, Any]:
    """The keys of Megatron's TransformerConfig that say how, not what, is computed."""
    return {
        "bf16": run.precision == "bf16",
        "params_dtype": dtype(run),
        "pipeline_dtype": dtype(run),
        "attention_softmax_in_fp32": True,
        "attention_backend": AttnBackend[run.kernels.attention],
        "apply_rope_fusion": used.rotary == "fused",
        "bias_activation_fusion": used.activation == "fused",
        "bias_dropout_fusion": used.activation == "fused",
        "cross_entropy_loss_fusion": used.cross_entropy == "fused",
        "cross_entropy_fusion_impl": "te" if used.cross_entropy == "fused" else "native",
        # Elsewhere `gpt` turns it on layer by layer: Megatron's output head would refuse it without apex.
        "gradient_accumulation_fusion": used.gradient_accumulation == "fused" and machine.fused_gradients,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "deterministic_mode": run.deterministic,
        **_recompute_options(run),
        **_fp8_options(run),
    }


def _recompute_options(run: Run) -> dict[str, Any]:
    recompute = run.recompute
    if recompute.mode == "none":
        return {}
    if recompute.mode == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    layers = recompute.layers or run.model.layers // run.parallel.pipeline
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


def _fp8_options(run: Run) -> dict[str, Any]:
    fp8 = run.fp8
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(fp8.bf16_first_layers or fp8.bf16_last_layers),
        "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
    }


def cast(model: MegatronModule, run: Run) -> MegatronModule:
    """Wraps the model so that it computes in the run's format; its outputs are float32 either way."""
    return Float16Module(model.config, model) if run.precision == "bf16" else model


def prepare_process(run: Run) -> None:
    """Sets what must be set before the first tensor is on a GPU and the first group is made.

    Raises BackendError where the environment says otherwise.
    """
    torch.use_deterministic_algorithms(run.deterministic)
    wanted: dict[str, str] = {}
    if run.parallel.tensor > 1 or run.parallel.context > 1:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # kernels start in order, so that communication is under way first
    if run.deterministic:
        wanted |= {name: choices[0] for name, choices in DETERMINISTIC.items()}
    for name, value in wanted.items():
        found, choices = os.environ.setdefault(name, value), DETERMINISTIC.get(name)
        if choices and found not in choices:
            raise BackendError(
                f"{name}: is {found}, and deterministic: true needs {' or '.join(choices)}; leave it out"
            )
    clash = [name for name in ATTENTION_VARIABLES if os.environ.get(name) not in (None, _attention_variable(run, name))]
    if clash:
        raise BackendError(f"{clash[0]}: is {os.environ[clash[0]]}; leave it out and set kernels.attention instead")


def _attention_variable(run: Run, name: str) -> str:
    """What Megatron sets one of Transformer Engine's variables to."""
    asked = run.kernels.attention
    return "1" if asked == "auto" or name == f"NVTE_{asked.upper()}_ATTN" else "0"
