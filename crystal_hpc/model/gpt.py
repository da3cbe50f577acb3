"""The model: Megatron-core's GPTModel with Crystal's shape, and muP's factors where Megatron has no place for them.

Tokens come in from `data.batches`, logits or per-token losses go out to `loss`. With Transformer Engine installed its
fused layers are used, otherwise Megatron's plain ones.
"""

from typing import Any

import torch

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.model import backend, mup, precision
from crystal_hpc.model.parallel import Layout

with backend.quiet():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import TransformerConfig


def transformer_config(run: Run) -> TransformerConfig:
    """What Megatron-core calls the run's model, layout and precision."""
    model = run.model
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        ffn_hidden_size=model.ffn,
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm],
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        rotary_interleaved=model.rotary_interleaved,
        apply_rope_fusion=False,  # Megatron's fused kernel does not know the interleaved pairing
        softmax_scale=derive.attention_scale(model, run.mup),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=run.parallel.tensor,
        pipeline_model_parallel_size=run.parallel.pipeline,
        pipeline_dtype=precision.dtype(run),
        use_cpu_initialization=backend.device().type == "cpu",
        **precision.transformer_options(run),
    )


def build(run: Run, layout: Layout) -> GPTModel:
    """This rank's part of the model, initialised, on its device."""
    with backend.quiet():
        config = transformer_config(run)
    if backend.have_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=run.model.vocab_size,
        max_sequence_length=max(phase.sequence_length for phase in run.phases),
        pre_process=layout.first_stage,
        post_process=layout.last_stage,
        share_embeddings_and_output_weights=run.model.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=run.model.rotary_fraction,
        rotary_base=run.model.rotary_base,
    )
    mup.initialize(model, run, layout.tensor_rank, layout.tensor_size)
    _scale_ends(model, run)
    return precision.cast(model, run).to(backend.device())


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
