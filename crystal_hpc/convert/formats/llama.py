"""Llama's format, for models with RMSNorm, full rotary positions and no biases; StableLM's has the same names.

Three things change on the way from Megatron:
- query, key and value of each head stand together, [q_0 k_0 v_0 q_1 ...]; published, each kind has a tensor of its own;
- Megatron may turn the pairs (0, 1), (2, 3), ... of a head; published, pairs are (0, n/2), (1, n/2 + 1), ...: the rows
  of query and key are put in that order, which leaves their products as they are;
- muP's factors go into the weights (`folding`); a tied table whose two ends have different factors becomes two tables.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crystal_hpc.config.schema import Run
from crystal_hpc.convert import names
from crystal_hpc.convert.formats import folding
from crystal_hpc.convert.formats.fields import Fields
from crystal_hpc.convert.names import Entry, Format, Parts, Shape, drop_padding, keep, kept
from crystal_hpc.errors import CheckpointError

TITLE = "Llama"
LIMITS: dict[str, Any] = {"norm": "rmsnorm", "bias": False, "rotary_fraction": 1.0}
"""Keys of the config's `model` that have only one value in this format."""


def _split_qkv(tensor: Tensor, shape: Shape) -> Parts:
    query, key, value = tensor.reshape(shape.model.heads, 3, shape.head_width, -1).unbind(1)
    query = folding.scale(query, folding.query_factor(shape))
    return tuple(part.flatten(0, 1) for part in (_pairs_to_halves(query, shape), _pairs_to_halves(key, shape), value))


def _join_qkv(parts: Sequence[Tensor], shape: Shape) -> Tensor:
    query, key, value = (part.reshape(shape.model.heads, shape.head_width, -1) for part in parts)
    query = folding.scale(query, 1 / folding.query_factor(shape))
    by_head = torch.stack([_halves_to_pairs(query, shape), _halves_to_pairs(key, shape), value], dim=1)
    return by_head.flatten(0, 2)


def _pairs_to_halves(heads: Tensor, shape: Shape) -> Tensor:
    """(heads, width, hidden): rows 0, 2, ..., then 1, 3, ... of the part that is rotated, then the rest."""
    if not shape.model.rotary_interleaved:
        return heads
    turned = shape.rotated
    return torch.cat([heads[:, 0:turned:2], heads[:, 1:turned:2], heads[:, turned:]], dim=1)


def _halves_to_pairs(heads: Tensor, shape: Shape) -> Tensor:
    """The inverse of `_pairs_to_halves`."""
    if not shape.model.rotary_interleaved:
        return heads
    turned = shape.rotated
    pairs = torch.stack([heads[:, : turned // 2], heads[:, turned // 2 : turned]], dim=2).flatten(1, 2)
    return torch.cat([pairs, heads[:, turned:]], dim=1)


def _split_fc1(tensor: Tensor, _shape: Shape) -> Parts:
    return tensor.chunk(2, dim=0)


def _join_fc1(parts: Sequence[Tensor], _shape: Shape) -> Tensor:
    return torch.cat(list(parts))


def _split_embedding(tensor: Tensor, shape: Shape) -> Parts:
    return (folding.scale(drop_padding(tensor, shape)[0], folding.embedding_factor(shape)),)


def _join_embedding(parts: Sequence[Tensor], shape: Shape) -> Tensor:
    return folding.scale(parts[0], 1 / folding.embedding_factor(shape))


def _split_head(tensor: Tensor, shape: Shape) -> Parts:
    return (folding.scale(drop_padding(tensor, shape)[0], folding.head_factor(shape)),)


def _join_head(parts: Sequence[Tensor], shape: Shape) -> Tensor:
    return folding.scale(parts[0], 1 / folding.head_factor(shape))


def _split_two_ends(tensor: Tensor, shape: Shape) -> Parts:
    return _split_embedding(tensor, shape) + _split_head(tensor, shape)


def _join_two_ends(parts: Sequence[Tensor], shape: Shape) -> Tensor:
    embedding, head = _join_embedding(parts[:1], shape), _join_head(parts[1:], shape)
    if not embedding.is_meta and not names.same_bits(embedding, head):
        raise CheckpointError("differ by more than muP's factors, and a model with tied embeddings has one table")
    return embedding


_LAYER = "decoder.layers.{n}."
_QKV, _FC1 = f"{_LAYER}self_attention.linear_qkv.", f"{_LAYER}mlp.linear_fc1."
_BLOCK = "model.layers.{n}."
_ATTENTION, _MLP = f"{_BLOCK}self_attn.", f"{_BLOCK}mlp."
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "lm_head.weight"
_PARTS = tuple(f"{_ATTENTION}{kind}_proj.weight" for kind in "qkv")

# The biases are those of StableLM's LayerNorms.
TABLE = (
    Entry(_EMBEDDING, ("model.embed_tokens.weight",), _split_embedding, _join_embedding),
    Entry(f"{_QKV}layer_norm_weight", (f"{_BLOCK}input_layernorm.weight",), keep, kept),
    Entry(f"{_QKV}layer_norm_bias", (f"{_BLOCK}input_layernorm.bias",), keep, kept),
    Entry(f"{_QKV}weight", _PARTS, _split_qkv, _join_qkv),
    Entry(f"{_LAYER}self_attention.linear_proj.weight", (f"{_ATTENTION}o_proj.weight",), keep, kept),
    Entry(f"{_FC1}layer_norm_weight", (f"{_BLOCK}post_attention_layernorm.weight",), keep, kept),
    Entry(f"{_FC1}layer_norm_bias", (f"{_BLOCK}post_attention_layernorm.bias",), keep, kept),
    Entry(f"{_FC1}weight", (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"), _split_fc1, _join_fc1),
    Entry(f"{_LAYER}mlp.linear_fc2.weight", (f"{_MLP}down_proj.weight",), keep, kept),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), keep, kept),
    Entry("decoder.final_layernorm.bias", ("model.norm.bias",), keep, kept),
    Entry("output_layer.weight", (_HEAD,), _split_head, _join_head),
)
TWO_ENDS = Entry(_EMBEDDING, ("model.embed_tokens.weight", _HEAD), _split_two_ends, _join_two_ends)

# Frequencies of the rotary positions, which older versions saved along with the weights.
BUFFERS = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def entries(shape: Shape) -> list[Entry]:
    """The table of one model."""
    return names.expand((TWO_ENDS, *TABLE[1:]) if folding.has_two_ends(shape) else TABLE, shape)


def copies(shape: Shape) -> Mapping[str, str]:
    """A tied head, where it is one."""
    return {_HEAD: "model.embed_tokens.weight"} if is_tied(shape) else {}


def is_tied(shape: Shape) -> bool:
    """Whether embedding and head are one table in the published model."""
    return shape.model.tied_embeddings and not folding.has_two_ends(shape)


def _reasons_against(shape: Shape) -> list[str]:
    return names.limit_reasons(TITLE, LIMITS, shape) + folding.reasons_against(shape)


def common_config(run: Run) -> dict[str, Any]:
    """The fields that Llama and StableLM share.

    `rope_theta` stands at the top level, where every version of Transformers looks for it: newer ones, which keep it
    in `rope_parameters`, move it there.
    """
    model = run.model
    return {
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "max_position_embeddings": max(phase.sequence_length for phase in run.phases),
        "initializer_range": model.init_std,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": is_tied(Shape(model, run.mup)),
        "attention_dropout": 0.0,
    }


def _published_config(run: Run) -> dict[str, Any]:
    return {
        "model_type": "llama",
        **common_config(run),
        "head_dim": run.model.hidden // run.model.heads,
        "rms_norm_eps": run.model.norm_epsilon,
        "attention_bias": False,
        "mlp_bias": False,
    }


def read_common(fields: Fields, key_value_heads: int | None) -> dict[str, Any]:
    """Keys of `Model` from the fields that Llama and StableLM share; `key_value_heads` where that field is missing."""
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    fields.only("head_dim", fields.head_width(hidden, heads, "num_attention_heads"), why="hidden_size over heads")
    if (groups := fields.whole("num_key_value_heads", key_value_heads or heads)) != heads:
        fields.problems.append(
            f"num_key_value_heads: {groups} for {heads} heads, and in our model each head has its own keys and values"
        )
    fields.only("hidden_act", "silu", "swish")
    base = fields.number("rope_theta", 10000.0, within=fields.rotary)
    if base != math.floor(base):
        fields.problems.append(f"rope_theta: {base:g} is no whole number")
    return {
        "layers": fields.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "ffn": fields.whole("intermediate_size"),
        "vocab_size": fields.whole("vocab_size"),
        "rotary_base": int(base),
        "rotary_interleaved": False,
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        "init_std": fields.number("initializer_range", 0.02),
    }


def _read_config(config: Mapping[str, Any]) -> tuple[Shape, int]:
    fields = Fields(config, TITLE)
    model = read_common(fields, None)
    for key in ("attention_bias", "mlp_bias"):
        fields.only(key, False)
    if (share := fields.number("partial_rotary_factor", 1.0, within=fields.rotary)) != 1.0:
        fields.problems.append(f"partial_rotary_factor: {share:g}, and a Llama rotates whole heads")
    longest = fields.whole("max_position_embeddings", 2048)
    return fields.shape(**model, **LIMITS, norm_epsilon=fields.number("rms_norm_eps", 1e-6)), longest


LLAMA = Format(
    name="llama",
    title=TITLE,
    architecture="LlamaForCausalLM",
    entries=entries,
    copies=copies,
    reasons_against=_reasons_against,
    published_config=_published_config,
    read_config=_read_config,
    buffers=BUFFERS,
)
