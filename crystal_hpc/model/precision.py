"""The number formats of a run: float32 throughout, or bfloat16 compute over float32 main weights and gradients."""

from typing import Any

import torch

from crystal_hpc.config.schema import Run
from crystal_hpc.model import backend

with backend.quiet():
    from megatron.core.transformer import MegatronModule
    from megatron.core.transformer.module import Float16Module


def dtype(run: Run) -> torch.dtype:
    """The format of activations and of the weights used in the forward pass."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[run.precision]


def transformer_options(run: Run) -> dict[str, Any]:
    """The keys of Megatron's TransformerConfig that concern precision."""
    return {"bf16": run.precision == "bf16", "params_dtype": dtype(run)}


def cast(model: MegatronModule, run: Run) -> MegatronModule:
    """Wraps the model so that it computes in the run's format; its outputs are float32 either way."""
    return Float16Module(model.config, model) if run.precision == "bf16" else model
