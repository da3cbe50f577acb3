"""CrystalCoder's own format: GPT-2's names, with rotary positions, SwiGLU, and muP's multipliers in the config.

Three things change on the way from Megatron:
- Megatron keeps query, key and value of each head together, [q_0 k_0 v_0 q_1 ...]; published are all of Q, K, V;
- linear weights are published as GPT-2's Conv1D has them, (in, out), transposed;
- Megatron activates the first half of `linear_fc1`; published, `c_fc(x) * silu(c_fc2(x))`: the gate is `c_fc2`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Mup, Run
from crystal_hpc.convert import names
from crystal_hpc.convert.formats.fields import Fields
from crystal_hpc.convert.names import KEEP, Entry, Format, Piece, Rule, Shape, Size

TITLE = "CrystalCoder"
LIMITS: dict[str, Any] = {
    "norm": "layernorm",
    "bias": True,
    "tied_embeddings": True,
    "rotary_interleaved": True,
    "rotary_base": 10000,
}
"""Keys of the config's `model` that have only one value in this format."""


def _flipped(tensor: Tensor) -> Tensor:
    """A matrix as Conv1D has it; a bias as it is."""
    return tensor.T if tensor.ndim == 2 else tensor


def _qkv_pieces(tensor: Tensor, parts: Sequence[Tensor], shape: Shape) -> Iterator[Piece]:
    by_head = tensor.view(shape.model.heads, 3, shape.head_width, *tensor.shape[1:])
    by_kind = _flipped(parts[0]).view(3, shape.model.heads, shape.head_width, *tensor.shape[1:])
    for kind in range(3):
        yield Piece(by_head[:, kind], by_kind[kind])


def _fc1_pieces(tensor: Tensor, parts: Sequence[Tensor], _shape: Shape) -> list[Piece]:
    (gate, value), (published_value, published_gate) = tensor.chunk(2), map(_flipped, parts)
    return [Piece(value, published_value), Piece(gate, published_gate)]


def _halves(size: Size, _shape: Shape) -> list[Size]:
    return [(*size[1:], size[0] // 2)] * 2


FLIP = Rule(lambda size, _: [size[::-1]], lambda tensor, parts, _: [Piece(tensor, parts[0].T)])
QKV = Rule(lambda size, _: [size[::-1]], _qkv_pieces)
FC1 = Rule(_halves, _fc1_pieces)

_LAYER = "decoder.layers.{n}."
_QKV, _PROJ = f"{_LAYER}self_attention.linear_qkv.", f"{_LAYER}self_attention.linear_proj."
_FC1, _FC2 = f"{_LAYER}mlp.linear_fc1.", f"{_LAYER}mlp.linear_fc2."
_BLOCK = "transformer.h.{n}."

TABLE = (
    Entry("embedding.word_embeddings.weight", ("transformer.wte.weight",), KEEP),
    Entry(f"{_QKV}layer_norm_weight", (f"{_BLOCK}ln_1.weight",), KEEP),
    Entry(f"{_QKV}layer_norm_bias", (f"{_BLOCK}ln_1.bias",), KEEP),
    Entry(f"{_QKV}weight", (f"{_BLOCK}attn.c_attn.weight",), QKV),
    Entry(f"{_QKV}bias", (f"{_BLOCK}attn.c_attn.bias",), QKV),
    Entry(f"{_PROJ}weight", (f"{_BLOCK}attn.c_proj.weight",), FLIP),
    Entry(f"{_PROJ}bias", (f"{_BLOCK}attn.c_proj.bias",), KEEP),
    Entry(f"{_FC1}layer_norm_weight", (f"{_BLOCK}ln_2.weight",), KEEP),
    Entry(f"{_FC1}layer_norm_bias", (f"{_BLOCK}ln_2.bias",), KEEP),
    Entry(f"{_FC1}weight", (f"{_BLOCK}mlp.c_fc.weight", f"{_BLOCK}mlp.c_fc2.weight"), FC1),
    Entry(f"{_FC1}bias", (f"{_BLOCK}mlp.c_fc.bias", f"{_BLOCK}mlp.c_fc2.bias"), FC1),
    Entry(f"{_FC2}weight", (f"{_BLOCK}mlp.c_proj.weight",), FLIP),
    Entry(f"{_FC2}bias", (f"{_BLOCK}mlp.c_proj.bias",), KEEP),
    Entry("decoder.final_layernorm.weight", ("transformer.ln_f.weight",), KEEP),
    Entry("decoder.final_layernorm.bias", ("transformer.ln_f.bias",), KEEP),
)


def _entries(shape: Shape) -> list[Entry]:
    return names.expand(TABLE, shape)


def _copies(_shape: Shape) -> Mapping[str, str]:
    return {"lm_head.weight": "transformer.wte.weight"}


def _reasons_against(shape: Shape) -> list[str]:
    return names.limit_reasons(TITLE, LIMITS, shape)


def _published_config(run: Run) -> dict[str, Any]:
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
        "rotary_dim": Shape(model, mup).rotated,
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


def _read_config(config: Mapping[str, Any]) -> tuple[Shape, int]:
    """The original release lacks `initializer_range`, and as in GPT-2's code of the time that means 0.02."""
    fields = Fields(config, TITLE)
    hidden, heads = fields.whole("n_embd"), fields.whole("n_head")
    width = fields.head_width(hidden, heads, "n_head")
    fields.only("activation_function", "swiglu")
    fields.only("position_embedding_type", "rotary")
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    fields.only("tie_word_embeddings", True)
    for key in ("activation_function", "position_embedding_type"):
        if config.get(key) is None:  # GPT-2's own defaults are others
            fields.problems.append(f"{key}: is missing")
    longest = fields.whole("n_positions", 1024)
    shape = fields.shape(
        mup=_read_mup(fields, hidden),
        layers=fields.whole("n_layer"),
        hidden=hidden,
        heads=heads,
        ffn=fields.whole("n_inner", 4 * hidden),
        vocab_size=fields.whole("vocab_size"),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        rotary_fraction=fields.rotary_fraction("rotary_dim", fields.whole("rotary_dim", least=0), width),
        init_std=fields.number("initializer_range", 0.02),
        **LIMITS,
    )
    return shape, longest


def _read_mup(fields: Fields, hidden: int) -> Mup | None:
    """None where no multiplier changes anything, as our own export says of a model without muP."""
    base = fields.number("mup_width_scale", 1.0) * hidden
    mup = Mup(
        base_hidden=max(round(base), 1),
        embedding_multiplier=fields.number("mup_embeddings_scale", 1.0),
        output_multiplier=fields.number("mup_output_alpha", 1.0),
        scale_attention_by_head=fields.flag("mup_scale_qk_dot_by_d", False),
    )
    if abs(base - mup.base_hidden) > 1e-6 * base:
        fields.problems.append(f"mup_width_scale: of n_embd = {hidden} it is {base:g}, no whole number of dimensions")
    plain = Mup(base_hidden=hidden, scale_attention_by_head=False)
    return None if mup == plain else mup


CRYSTALCODER = Format(
    name="crystalcoder",
    title=TITLE,
    architecture="CrystalCoderForCausalLM",
    entries=_entries,
    copies=_copies,
    reasons_against=_reasons_against,
    published_config=_published_config,
    read_config=_read_config,
    # The causal mask, which GPT-2's code of the time saved along with the weights.
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    code_files=("configuration_crystalcoder.py", "modeling_crystalcoder.py"),
)
