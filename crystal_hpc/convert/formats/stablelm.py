"""StableLM's format, for models with LayerNorm, partial rotary positions and no biases on the linear layers.

Its tensors have Llama's names, and each norm has a bias; see `llama` for what changes on the way.
"""

from collections.abc import Mapping
from typing import Any

from crystal_hpc.config.schema import Run
from crystal_hpc.convert import names
from crystal_hpc.convert.formats import folding, llama
from crystal_hpc.convert.formats.fields import Fields
from crystal_hpc.convert.names import Format, Shape

TITLE = "StableLM"
LIMITS: dict[str, Any] = {"norm": "layernorm", "bias": False}
"""Keys of the config's `model` that have only one value in this format."""
KEY_VALUE_HEADS = 32  # what Transformers takes where the field is missing, whatever the number of heads


def _reasons_against(shape: Shape) -> list[str]:
    return names.limit_reasons(TITLE, LIMITS, shape) + folding.reasons_against(shape)


def _published_config(run: Run) -> dict[str, Any]:
    return {
        "model_type": "stablelm",
        **llama.common_config(run),
        "layer_norm_eps": run.model.norm_epsilon,
        "partial_rotary_factor": run.model.rotary_fraction,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "hidden_dropout": 0.0,
    }


def _read_config(config: Mapping[str, Any]) -> tuple[Shape, int]:
    fields = Fields(config, TITLE)
    model = llama.read_common(fields, KEY_VALUE_HEADS)
    for key in ("use_qkv_bias", "qk_layernorm", "use_parallel_residual"):
        fields.only(key, False)
    width = max(model["hidden"] // model["heads"], 1)
    share = fields.number("partial_rotary_factor", 0.25, within=fields.rotary, may_be_zero=True)
    longest = fields.whole("max_position_embeddings", 4096)
    shape = fields.shape(
        **model,
        **LIMITS,
        rotary_fraction=fields.rotary_fraction("partial_rotary_factor", int(width * share), width),
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
    )
    return shape, longest


STABLELM = Format(
    name="stablelm",
    title=TITLE,
    architecture="StableLmForCausalLM",
    entries=llama.entries,
    copies=llama.copies,
    reasons_against=_reasons_against,
    published_config=_published_config,
    read_config=_read_config,
    buffers=llama.BUFFERS,
)
