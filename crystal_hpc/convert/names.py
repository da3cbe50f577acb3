"""Which Megatron tensor is which tensor of a published format: a table, as data, read in both directions.

`weights` walks it from left to right, checkpoint to Hugging Face folder; `to_megatron` goes back. Every tensor of the
model stands in exactly one entry, so that a tensor that is left over, on either side, is an error and never a silent
loss. A further format (Llama, StableLM) is one more `Table`.

CrystalCoder's format is GPT-2's with rotary positions, SwiGLU and muP. Three things change on the way:
- Megatron keeps query, key and value of each head together, [q_0 k_0 v_0 q_1 k_1 ...]; published are all of Q, K, V;
- linear weights are published as GPT-2's Conv1D has them, (in, out), transposed;
- Megatron activates the first half of `linear_fc1`; published, `c_fc(x) * silu(c_fc2(x))`: the gate is `c_fc2`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Model, Run
from crystal_hpc.errors import CheckpointError

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the published tensors that hold the same numbers; `{n}` stands for the layer."""

    megatron: str
    published: tuple[str, ...]
    split: Callable[[Tensor, Model], Parts]
    """The published tensors, in the order of `published`; may be views."""
    join: Callable[[Sequence[Tensor], Model], Tensor]
    """The inverse of `split`."""


@dataclass(frozen=True)
class Table:
    """A published format."""

    name: str
    entries: tuple[Entry, ...]
    limits: Mapping[str, Any]
    """Keys of the config's `model` that have only one value in this format."""
    copies: Mapping[str, str]
    """Published names that repeat another tensor: a reader accepts them, an export leaves them out."""
    buffers: tuple[str, ...]
    """Published names (regular expressions) that hold no weights; a reader passes over them."""


def _keep(tensor: Tensor, _model: Model) -> Parts:
    return (tensor,)


def _kept(parts: Sequence[Tensor], _model: Model) -> Tensor:
    return parts[0]


def _transpose(tensor: Tensor, _model: Model) -> Parts:
    return (tensor.T,)


def _transposed(parts: Sequence[Tensor], _model: Model) -> Tensor:
    return parts[0].T.contiguous()


def _drop_padding(tensor: Tensor, model: Model) -> Parts:
    # Other trainers pad the vocabulary for tensor parallelism; the rows beyond it belong to no token.
    return (tensor[: model.vocab_size],)


def _group_by_kind(tensor: Tensor, model: Model) -> Tensor:
    """[q_0 k_0 v_0 q_1 ...] to [q_0 q_1 ... k_0 k_1 ... v_0 v_1 ...], along the first axis."""
    by_head = tensor.reshape(model.heads, 3, -1, *tensor.shape[1:])
    return by_head.transpose(0, 1).reshape(tensor.shape)


def _group_by_head(tensor: Tensor, model: Model) -> Tensor:
    """The inverse of `_group_by_kind`."""
    by_kind = tensor.reshape(3, model.heads, -1, *tensor.shape[1:])
    return by_kind.transpose(0, 1).reshape(tensor.shape)


def _split_qkv_weight(tensor: Tensor, model: Model) -> Parts:
    return (_group_by_kind(tensor, model).T,)


def _join_qkv_weight(parts: Sequence[Tensor], model: Model) -> Tensor:
    return _group_by_head(parts[0].T, model).contiguous()


def _split_qkv_bias(tensor: Tensor, model: Model) -> Parts:
    return (_group_by_kind(tensor, model),)


def _join_qkv_bias(parts: Sequence[Tensor], model: Model) -> Tensor:
    return _group_by_head(parts[0], model)


def _split_fc1(tensor: Tensor, _model: Model) -> Parts:
    gate, value = tensor.chunk(2, dim=0)
    return (value.T, gate.T) if tensor.ndim == 2 else (value, gate)


def _join_fc1(parts: Sequence[Tensor], _model: Model) -> Tensor:
    value, gate = parts
    return torch.cat([gate.T, value.T] if value.ndim == 2 else [gate, value])


_LAYER = "decoder.layers.{n}."
_BLOCK = "transformer.h.{n}."

CRYSTALCODER = Table(
    name="CrystalCoder",
    entries=(
        Entry("embedding.word_embeddings.weight", ("transformer.wte.weight",), _drop_padding, _kept),
        Entry(f"{_LAYER}self_attention.linear_qkv.layer_norm_weight", (f"{_BLOCK}ln_1.weight",), _keep, _kept),
        Entry(f"{_LAYER}self_attention.linear_qkv.layer_norm_bias", (f"{_BLOCK}ln_1.bias",), _keep, _kept),
        Entry(
            f"{_LAYER}self_attention.linear_qkv.weight",
            (f"{_BLOCK}attn.c_attn.weight",),
            _split_qkv_weight,
            _join_qkv_weight,
        ),
        Entry(
            f"{_LAYER}self_attention.linear_qkv.bias", (f"{_BLOCK}attn.c_attn.bias",), _split_qkv_bias, _join_qkv_bias
        ),
        Entry(f"{_LAYER}self_attention.linear_proj.weight", (f"{_BLOCK}attn.c_proj.weight",), _transpose, _transposed),
        Entry(f"{_LAYER}self_attention.linear_proj.bias", (f"{_BLOCK}attn.c_proj.bias",), _keep, _kept),
        Entry(f"{_LAYER}mlp.linear_fc1.layer_norm_weight", (f"{_BLOCK}ln_2.weight",), _keep, _kept),
        Entry(f"{_LAYER}mlp.linear_fc1.layer_norm_bias", (f"{_BLOCK}ln_2.bias",), _keep, _kept),
        Entry(
            f"{_LAYER}mlp.linear_fc1.weight",
            (f"{_BLOCK}mlp.c_fc.weight", f"{_BLOCK}mlp.c_fc2.weight"),
            _split_fc1,
            _join_fc1,
        ),
        Entry(
            f"{_LAYER}mlp.linear_fc1.bias", (f"{_BLOCK}mlp.c_fc.bias", f"{_BLOCK}mlp.c_fc2.bias"), _split_fc1, _join_fc1
        ),
        Entry(f"{_LAYER}mlp.linear_fc2.weight", (f"{_BLOCK}mlp.c_proj.weight",), _transpose, _transposed),
        Entry(f"{_LAYER}mlp.linear_fc2.bias", (f"{_BLOCK}mlp.c_proj.bias",), _keep, _kept),
        Entry("decoder.final_layernorm.weight", ("transformer.ln_f.weight",), _keep, _kept),
        Entry("decoder.final_layernorm.bias", ("transformer.ln_f.bias",), _keep, _kept),
    ),
    limits={
        "norm": "layernorm",
        "bias": True,
        "tied_embeddings": True,
        "rotary_interleaved": True,
        "rotary_base": 10000,
    },
    copies={"lm_head.weight": "transformer.wte.weight"},
    # The causal mask, which GPT-2's code of the time saved along with the weights.
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)


def expand(table: Table, layers: int) -> list[Entry]:
    """The table with every layer's entries written out, in the order of the forward pass."""
    entries = list(table.entries)
    layered = [index for index, entry in enumerate(entries) if "{n}" in entry.megatron]
    first, last = layered[0], layered[-1] + 1
    blocks = [_numbered(entry, n) for n in range(layers) for entry in entries[first:last]]
    return entries[:first] + blocks + entries[last:]


def _numbered(entry: Entry, n: int) -> Entry:
    published = tuple(name.format(n=n) for name in entry.published)
    return replace(entry, megatron=entry.megatron.format(n=n), published=published)


def check_complete(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises CheckpointError that names what is missing from, or left over in, `found`."""
    expected, found = set(expected), set(found)
    if missing := sorted(expected - found):
        raise CheckpointError(f"{where}: lacks {_listed(missing)}, which a model of this config has")
    if left_over := sorted(found - expected):
        raise CheckpointError(f"{where}: holds {_listed(left_over)}, for which a model of this config has no place")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_expressible(table: Table, model: Model) -> None:
    """Raises CheckpointError when the format has no way to say what this model is."""
    for key, only in table.limits.items():
        value = getattr(model, key)
        if value != only:
            raise CheckpointError(
                f"model.{key}: the {table.name} format can only express {only}, and this run has {value}; "
                "it cannot be exported in this format"
            )


def to_published(table: Table, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of a model's tensors under their published names. Raises CheckpointError for a missing or left-over one.

    `weights.export` does the same one tensor at a time, straight from the files.
    """
    entries = expand(table, model.layers)
    check_complete((entry.megatron for entry in entries), tensors, "the Megatron tensors")
    return dict(pair for entry in entries for pair in split(entry, model, tensors[entry.megatron]))


def to_megatron(table: Table, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of a model's tensors under their Megatron names; the vocabulary is not padded.

    Raises CheckpointError for a missing or left-over tensor, and for a copy that differs from its original.
    """
    entries = expand(table, model.layers)
    found = {name for name in tensors if not any(re.fullmatch(buffer, name) for buffer in table.buffers)}
    check_complete((name for entry in entries for name in entry.published), found - set(table.copies), "the weights")
    for copy in found & set(table.copies):
        if not torch.equal(tensors[copy], tensors[table.copies[copy]]):
            raise CheckpointError(f"{copy}: differs from {table.copies[copy]}, but a tied model has one of them")
    return {entry.megatron: entry.join([tensors[name] for name in entry.published], model) for entry in entries}


def split(entry: Entry, model: Model, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The published (name, tensor) pairs of one Megatron tensor."""
    return zip(entry.published, entry.split(tensor, model), strict=True)


def published_config(run: Run) -> dict[str, Any]:
    """The fields of CrystalCoder's config.json that say what the model is, under their published names."""
    model, mup = run.model, run.mup
    return {
        "model_type": "crystalcoder",
        "activation_function": "swiglu",
        "position_embedding_type": "rotary",
        "n_layer": model.layers,
        "n_embd": model.hidden,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "n_positions": max(phase.sequence_length for phase in run.phases),
        "vocab_size": model.vocab_size,
        "rotary_dim": int(model.hidden // model.heads * model.rotary_fraction),
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_std,
        "mup_embeddings_scale": derive.embedding_scale(mup),
        "mup_output_alpha": mup.output_multiplier if mup else 1.0,
        "mup_width_scale": derive.width_multiplier(model, mup),
        "mup_scale_qk_dot_by_d": bool(mup and mup.scale_attention_by_head),
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
