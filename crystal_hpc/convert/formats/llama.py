"""Llama's format, for models with RMSNorm, full rotary positions and no biases; StableLM's has the same names.

Three things change on the way from Megatron:
- query, key and value of each head stand together, [q_0 k_0 v_0 q_1 ...]; published, each kind has a tensor of its own;
- Megatron may turn the pairs (0, 1), (2, 3), ... of a head; published, pairs are (0, n/2), (1, n/2 + 1), ...: the rows
  of query and key are put in that order, which leaves their products as they are;
- muP's factors go into the weights (`folding`); a tied table whose two ends have different factors becomes two tables.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from crystal_hpc.config.schema import Run
from crystal_hpc.convert import names
from crystal_hpc.convert.formats import folding
from crystal_hpc.convert.formats.fields import Fields
from crystal_hpc.convert.names import KEEP, Entry, Format, Piece, Rule, Shape, Size

TITLE = "Llama"
LIMITS: dict[str, Any] = {"norm": "rmsnorm", "bias": False, "rotary_fraction": 1.0}
"""Keys of the config's `model` that have only one value in this format."""


def _qkv_pieces(tensor: Tensor, parts: Sequence[Tensor], shape: Shape) -> Iterator[Piece]:
    by_head = tensor.view(shape.model.heads, 3, shape.head_width, -1)
    factors = folding.query_factor(shape), 1.0, 1.0
    for kind, (part, factor) in enumerate(zip(parts, factors, strict=True)):
        mine, theirs = by_head[:, kind], part.view(shape.model.heads, shape.head_width, -1)
        turned = shape.rotated if kind < 2 and shape.model.rotary_interleaved else 0
        # Rows 0, 2, ..., then 1, 3, ... of what is rotated; the rest as it is.
        yield Piece(mine[:, 0:turned:2], theirs[:, : turned // 2], factor)
        yield Piece(mine[:, 1:turned:2], theirs[:, turned // 2 : turned], factor)
        yield Piece(mine[:, turned:], theirs[:, turned:], factor)


def _fc1_pieces(tensor: Tensor, parts: Sequence[Tensor], _shape: Shape) -> list[Piece]:
    return [Piece(mine, theirs) for mine, theirs in zip(tensor.chunk(2), parts, strict=True)]


def _shares(count: int) -> Callable[[Size, Shape], list[Size]]:
    return lambda size, _: [(size[0] // count, *size[1:])] * count


def _scaled(*factors: Callable[[Shape], float]) -> Rule:
    """The whole table, once for each factor."""

    def pieces(tensor: Tensor, parts: Sequence[Tensor], shape: Shape) -> list[Piece]:
        pairs = enumerate(zip(parts, factors, strict=True))
        return [Piece(tensor, part, factor(shape), again=number > 0) for number, (part, factor) in pairs]

    return Rule(lambda size, _: [size] * len(factors), pieces)


QKV, FC1 = Rule(_shares(3), _qkv_pieces), Rule(_shares(2), _fc1_pieces)

_LAYER = "decoder.layers.{n}."
_QKV, _FC1 = f"{_LAYER}self_attention.linear_qkv.", f"{_LAYER}mlp.linear_fc1."
_BLOCK = "model.layers.{n}."
_ATTENTION, _MLP = f"{_BLOCK}self_attn.", f"{_BLOCK}mlp."
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "lm_head.weight"
_PARTS = tuple(f"{_ATTENTION}{kind}_proj.weight" for kind in "qkv")

# The biases are those of StableLM's LayerNorms.
TABLE = (
    Entry(_EMBEDDING, ("model.embed_tokens.weight",), _scaled(folding.embedding_factor)),
    Entry(f"{_QKV}layer_norm_weight", (f"{_BLOCK}input_layernorm.weight",), KEEP),
    Entry(f"{_QKV}layer_norm_bias", (f"{_BLOCK}input_layernorm.bias",), KEEP),
    Entry(f"{_QKV}weight", _PARTS, QKV),
    Entry(f"{_LAYER}self_attention.linear_proj.weight", (f"{_ATTENTION}o_proj.weight",), KEEP),
    Entry(f"{_FC1}layer_norm_weight", (f"{_BLOCK}post_attention_layernorm.weight",), KEEP),
    Entry(f"{_FC1}layer_norm_bias", (f"{_BLOCK}post_attention_layernorm.bias",), KEEP),
    Entry(f"{_FC1}weight", (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"), FC1),
    Entry(f"{_LAYER}mlp.linear_fc2.weight", (f"{_MLP}down_proj.weight",), KEEP),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), KEEP),
    Entry("decoder.final_layernorm.bias", ("model.norm.bias",), KEEP),
    Entry("output_layer.weight", (_HEAD,), _scaled(folding.head_factor)),
)
TWO_ENDS = Entry(
    _EMBEDDING, ("model.embed_tokens.weight", _HEAD), _scaled(folding.embedding_factor, folding.head_factor)
)

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
