"""The model: Megatron-core's GPTModel with Crystal's shape, and muP's factors where Megatron has no place for them.

Tokens come in from `data.batches`, logits or per-token losses go out to `loss`. With Transformer Engine installed its
fused layers are used, otherwise Megatron's plain ones.
"""

from typing import Any

import torch

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.model import backend, mup, precision
from crystal_hpc.model.machine import Machine, probe
from crystal_hpc.model.parallel import Layout
from crystal_hpc.model.precision import Used

with backend.quiet():
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build


def transformer_options(run: Run, machine: Machine) -> dict[str, Any]:
    """Megatron's TransformerConfig of a run on a machine, as its keywords. Raises BackendError for what that lacks."""
    model, used = run.model, precision.choose(run, machine)
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "ffn_hidden_size": used.ffn,
        "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm],
        "layernorm_epsilon": model.norm_epsilon,
        "add_bias_linear": model.bias,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "rotary_interleaved": model.rotary_interleaved,
        "softmax_scale": derive.attention_scale(model, run.mup),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": run.parallel.tensor,
        "pipeline_model_parallel_size": run.parallel.pipeline,
        "context_parallel_size": run.parallel.context,
        "sequence_parallel": run.parallel.sequence,
        "use_cpu_initialization": not machine.gpu,
        **precision.transformer_options(run, used, machine),
    }


def build(run: Run, layout: Layout, machine: Machine | None = None) -> GPTModel:
    """This rank's part of the model, initialised, on its device. Raises BackendError for what `machine` lacks."""
    machine = machine or probe()
    used = precision.choose(run, machine)
    with backend.quiet():
        config = TransformerConfig(**transformer_options(run, machine))
    model = GPTModel(
        config=config,
        transformer_layer_spec=_layers(config, used),
        vocab_size=run.model.vocab_size,
        max_sequence_length=max(phase.sequence_length for phase in run.phases),
        pre_process=layout.first_stage,
        post_process=layout.last_stage,
        share_embeddings_and_output_weights=run.model.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=run.model.rotary_fraction,
        rotary_base=run.model.rotary_base,
    )
    model.ffn = run.model.ffn  # without what pads it; `train.sharding` asks
    if used.gradient_accumulation == "fused in blocks":
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    mup.initialize(model, run, layout.tensor_rank, layout.tensor_size)
    _scale_ends(model, run)
    _part_recomputed_biases(model, run)
    return precision.cast(model, run).to(backend.device())


class PlainNorm:
    """Torch's norm in a form that Megatron builds; its own wrapper of that refuses sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """A norm whose parameters Megatron finds marked if their gradients are to be summed over tensor ranks."""
        kind = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _layers(config: TransformerConfig, used: Used) -> Any:
    """Megatron's specification of this stage's blocks."""
    if used.layers == "transformer-engine":
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    norm = FusedLayerNorm if used.norms == "apex" else PlainNorm
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)


def _scale_ends(model: GPTModel, run: Run) -> None:
    """Multiplies the embedded tokens and the logits by muP's factors."""
    embedding, output = derive.embedding_scale(run.mup), derive.output_scale(run.model, run.mup)

    def scale_embedding(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded * embedding

    def scale_logits(_module: Any, _inputs: Any, result: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        return result[0] * output, result[1]

    if embedding != 1.0 and model.pre_process:
        model.embedding.register_forward_hook(scale_embedding)
    if output != 1.0 and model.post_process:
        model.output_layer.register_forward_hook(scale_logits)


def _part_recomputed_biases(model: GPTModel, run: Run) -> None:
    """Lets a feed-forward network with biases be recomputed.

    Megatron returns its last bias from there as it is, to be added later. A parameter that comes out of a function of
    autograd's is taken for its result; recomputed, it would be computed from itself, without end.
    """

    def copy_bias(_module: Any, _inputs: Any, result: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        return result[0], result[1].clone()

    if run.model.bias and run.recompute.mode == "selective" and "mlp" in run.recompute.modules:
        for layer in model.decoder.layers:
            layer.mlp.register_forward_hook(copy_bias)
