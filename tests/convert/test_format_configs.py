"""Configs as others write them: CrystalCoder's as released, Llama's and StableLM's of all ages, and what is refused."""

from typing import Any

import pytest
from transformers import LlamaConfig, StableLmConfig

from crystal_hpc.config.schema import Model, Mup
from crystal_hpc.convert import formats
from crystal_hpc.convert.names import Shape
from crystal_hpc.errors import CheckpointError

LLAMA, STABLELM, CRYSTALCODER = (formats.by_name(name) for name in ("llama", "stablelm", "crystalcoder"))

# LLM360/Crystal's config.json, as released: no initializer_range.
RELEASED = {
    "attn_pdrop": 0.0,
    "scale_attn_weights": True,
    "resid_pdrop": 0.0,
    "mup_embeddings_scale": 14.6,
    "n_inner": 10922,
    "n_embd": 4096,
    "layer_norm_epsilon": 1e-05,
    "n_positions": 2048,
    "activation_function": "swiglu",
    "n_head": 32,
    "n_layer": 32,
    "mup_output_alpha": 2.22,
    "mup_width_scale": 0.0625,
    "position_embedding_type": "rotary",
    "rotary_dim": 32,
    "mup_scale_qk_dot_by_d": True,
    "tie_word_embeddings": True,
    "vocab_size": 32032,
    "embd_pdrop": 0.0,
    "model_type": "crystalcoder",
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "architectures": ["CrystalCoderLMHeadModel"],
}
CRYSTAL = Model(layers=32, hidden=4096, heads=32, ffn=10922, vocab_size=32032, init_std=0.02)
CRYSTAL_MUP = Mup(base_hidden=256, embedding_multiplier=14.6, output_multiplier=2.22)


def test_crystals_config_as_it_was_released_is_read() -> None:
    assert formats.of_config(RELEASED) is CRYSTALCODER
    assert CRYSTALCODER.read_config(RELEASED) == (Shape(CRYSTAL, CRYSTAL_MUP), 2048)


def test_a_crystalcoder_config_without_multipliers_is_a_model_without_mup() -> None:
    plain = {key: value for key, value in RELEASED.items() if not key.startswith("mup_")}
    assert CRYSTALCODER.read_config(plain)[0] == Shape(CRYSTAL)
    del plain["layer_norm_epsilon"], plain["tie_word_embeddings"], plain["scale_attn_weights"], plain["n_positions"]
    assert CRYSTALCODER.read_config(plain) == (Shape(CRYSTAL), 1024)


def test_the_share_of_a_head_that_is_rotated_gives_back_every_number_of_dimensions() -> None:
    # 26 / 46 x 46 is less than 26 in floating point, and would round down to 25.
    for width, rotated in ((w, r) for w in range(2, 130, 2) for r in range(0, w + 1, 2)):
        config = {**RELEASED, "n_embd": width, "n_head": 1, "rotary_dim": rotated, "mup_width_scale": 1.0}
        assert CRYSTALCODER.read_config(config)[0].rotated == rotated


PLAIN_LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PLAIN_STABLELM = {**PLAIN_LLAMA, "model_type": "stablelm", "num_key_value_heads": 4}


def test_fields_that_are_missing_mean_what_transformers_takes_for_them() -> None:
    for config, kind in ((PLAIN_LLAMA, LlamaConfig), (PLAIN_STABLELM, StableLmConfig)):
        source = formats.of_config(config)
        assert source.read_config(config) == source.read_config(kind(**config).to_dict())


@pytest.mark.parametrize("place", ["top", "rope_parameters", "rope_scaling"])
def test_the_rotary_base_is_found_where_old_and_new_versions_keep_it(place: str) -> None:
    inside = {"rope_theta": 500000.0, "partial_rotary_factor": 0.5}
    config = {**PLAIN_STABLELM, **(inside if place == "top" else {place: {**inside, "rope_type": "default"}})}
    model = STABLELM.read_config(config)[0].model
    assert (model.rotary_base, model.rotary_fraction) == (500000, 0.5)
    assert STABLELM.read_config({**config, "partial_rotary_factor": 0})[0].model.rotary_fraction in (0, 0.5)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (PLAIN_LLAMA, {"num_key_value_heads": 2}, "num_key_value_heads: 2 for 4 heads"),
        (PLAIN_LLAMA, {"attention_bias": True}, "attention_bias: True, and our model can only do False"),
        (PLAIN_LLAMA, {"mlp_bias": True}, "mlp_bias: True"),
        (PLAIN_LLAMA, {"head_dim": 32}, "head_dim: 32, and our model can only do 16 (hidden_size over heads)"),
        (PLAIN_LLAMA, {"num_attention_heads": 3}, "num_attention_heads: 3 does not divide the hidden width of 64"),
        (PLAIN_LLAMA, {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        (PLAIN_LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: {'type': 'linear'"),
        (PLAIN_LLAMA, {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: {'rope_type': 'llama3'}"),
        (PLAIN_LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope_parameters: {'full_attention': {}}"),
        (PLAIN_LLAMA, {"rope_scaling": "linear"}, "rope_scaling: 'linear'"),
        (PLAIN_LLAMA, {"rope_theta": 10000.5}, "rope_theta: 10000.5 is no whole number"),
        (PLAIN_LLAMA, {"rope_theta": "big"}, "rope_theta: 'big' is no number above zero"),
        (PLAIN_LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5, and a Llama rotates whole heads"),
        (PLAIN_LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings: 1 is neither true nor false"),
        (PLAIN_LLAMA, {"hidden_size": 64.0}, "hidden_size: 64.0 is no whole number of at least 1"),
        (PLAIN_LLAMA, {"intermediate_size": None}, "intermediate_size: is missing"),
        (PLAIN_LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps: 0 is no number above zero"),
        (PLAIN_LLAMA, {"max_position_embeddings": 0}, "max_position_embeddings: 0"),
        (PLAIN_LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config: only weights that are not quantised"),
        (PLAIN_STABLELM, {"num_key_value_heads": None}, "num_key_value_heads: 32 for 4 heads"),
        (PLAIN_STABLELM, {"use_qkv_bias": True}, "use_qkv_bias: True"),
        (PLAIN_STABLELM, {"qk_layernorm": True}, "qk_layernorm: True"),
        (PLAIN_STABLELM, {"use_parallel_residual": True}, "use_parallel_residual: True"),
        (PLAIN_STABLELM, {"partial_rotary_factor": 0.2}, "partial_rotary_factor: 3 of 16 dimensions"),
        (PLAIN_STABLELM, {"partial_rotary_factor": 1.5}, "partial_rotary_factor: 24 of 16 dimensions"),
        (RELEASED, {"activation_function": "gelu"}, "activation_function: 'gelu'"),
        (RELEASED, {"activation_function": None}, "activation_function: is missing"),
        (RELEASED, {"position_embedding_type": "alibi"}, "position_embedding_type: 'alibi'"),
        (RELEASED, {"rotary_dim": None}, "rotary_dim: is missing"),
        (RELEASED, {"rotary_dim": 33}, "rotary_dim: 33 of 128 dimensions cannot be turned in pairs"),
        (RELEASED, {"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        (RELEASED, {"scale_attn_weights": False}, "scale_attn_weights: False"),
        (RELEASED, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        (RELEASED, {"add_cross_attention": True}, "add_cross_attention: True"),
        (RELEASED, {"mup_width_scale": 0.0626}, "mup_width_scale: of n_embd = 4096 it is 256.41, no whole number"),
        (RELEASED, {"mup_scale_qk_dot_by_d": "yes"}, "mup_scale_qk_dot_by_d: 'yes' is neither true nor false"),
    ],
)
def test_a_config_that_says_what_our_model_cannot_do_is_refused_by_the_field(
    config: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    source = formats.of_config(config)
    with pytest.raises(CheckpointError) as caught:
        source.read_config({**config, **change})
    start = f"config.json: not a {source.title} model that can be read here: "
    assert str(caught.value).startswith(start + said)
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_with_a_config_is_told_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"num_key_value_heads: 2 .*; attention_bias: True"):
        LLAMA.read_config({**PLAIN_LLAMA, "num_key_value_heads": 2, "attention_bias": True})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "config.json: lacks model_type; it can be one of crystalcoder, llama, stablelm"),
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is no format that can be read; it can be one of crystalcoder"),
        ({"model_type": ["llama"]}, r"model_type: \['llama'\] is no format"),
    ],
)
def test_an_unknown_kind_of_model_is_refused_with_what_is_known(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        formats.of_config(config)
