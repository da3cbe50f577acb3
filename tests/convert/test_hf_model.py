"""The Transformers model against an independent float64 forward pass, and what users do with it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from crystal_hpc.convert.formats import by_name
from crystal_hpc.convert.hf.configuration_crystalcoder import CrystalCoderConfig
from crystal_hpc.convert.hf.modeling_crystalcoder import Conv1D, CrystalCoderForCausalLM

Array = npt.NDArray[np.float64]

MUP: dict[str, Any] = {
    "mup_embeddings_scale": 14.6,
    "mup_output_alpha": 2.22,
    "mup_width_scale": 0.5,
    "mup_scale_qk_dot_by_d": True,
}
PLAIN: dict[str, Any] = {
    "mup_embeddings_scale": 1.0,
    "mup_output_alpha": 1.0,
    "mup_width_scale": 1.0,
    "mup_scale_qk_dot_by_d": False,
}
# Float32 rounds to 6e-8; sums of up to 84 terms through two layers stay well below this share of the largest logit.
TOLERANCE = 1e-5


def build(scales: dict[str, Any] = MUP) -> CrystalCoderForCausalLM:
    """A small model with random weights, none of them zero or one."""
    config = CrystalCoderConfig(
        vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=84, rotary_dim=4, **scales
    )
    model = CrystalCoderForCausalLM(config)
    model.eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter == 1))
    return model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(4))


def normalized(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    return result


def turned(x: Array, position: int, dimensions: int) -> Array:
    """One head's vector with pairs (0, 1), (2, 3), ... turned by position / 10000^(2i / dimensions)."""
    result = x.copy()
    for pair in range(dimensions // 2):
        angle = position / 10000 ** (2 * pair / dimensions)
        a, b = x[2 * pair], x[2 * pair + 1]
        result[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        result[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return result


def attend(qkv: Array, config: CrystalCoderConfig) -> Array:
    """Causal attention of one sequence, (T, 3E) to (T, E), a head and a token at a time."""
    length, width = qkv.shape[0], config.n_embd // config.n_head
    divisor = width if config.mup_scale_qk_dot_by_d else math.sqrt(width)
    mixed = np.zeros((length, config.n_embd))
    for head in range(config.n_head):
        part = slice(head * width, (head + 1) * width)
        query, key, value = (third[:, part] for third in np.split(qkv, 3, axis=1))
        query = np.stack([turned(row, t, config.rotary_dim) for t, row in enumerate(query)])
        key = np.stack([turned(row, t, config.rotary_dim) for t, row in enumerate(key)])
        for t in range(length):
            scores = key[: t + 1] @ query[t] / divisor
            shares = np.exp(scores - scores.max())
            mixed[t, part] = shares / shares.sum() @ value[: t + 1]
    return mixed


def reference_logits(model: CrystalCoderForCausalLM, row: Tensor) -> Array:
    """Crystal's forward pass of one sequence in float64: pre-norm blocks, value * silu(gate), muP factors."""
    config = model.config
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def linear(x: Array, name: str) -> Array:
        product: Array = x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return product

    def norm(x: Array, name: str) -> Array:
        return normalized(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["transformer.wte.weight"][row.numpy()] * config.mup_embeddings_scale
    for n in range(config.n_layer):
        block = f"transformer.h.{n}"
        x = x + linear(attend(linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), config), f"{block}.attn.c_proj")
        inside = norm(x, f"{block}.ln_2")
        gate = linear(inside, f"{block}.mlp.c_fc2")
        x = x + linear(linear(inside, f"{block}.mlp.c_fc") * gate / (1 + np.exp(-gate)), f"{block}.mlp.c_proj")
    head = weights["transformer.wte.weight"].T
    logits: Array = norm(x, "transformer.ln_f") @ head * config.mup_output_alpha * config.mup_width_scale
    return logits


@pytest.mark.parametrize("scales", [MUP, PLAIN], ids=["with muP", "without muP"])
def test_logits_are_those_of_an_independent_forward_pass(scales: dict[str, Any]) -> None:
    model, rows = build(scales), tokens(2, 20)
    with torch.no_grad():
        logits = model(rows).logits.numpy()
    expected = np.stack([reference_logits(model, row) for row in rows])
    assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


@torch.no_grad()
def test_greedy_generation_with_a_cache_picks_what_the_full_pass_picks() -> None:
    model, rows = build(), tokens(2, 5)
    generated = model.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert generated.shape == (2, 17)
    picked = model(generated, use_cache=False).logits.argmax(-1)
    assert torch.equal(generated[:, 5:], picked[:, 4:-1])


@torch.no_grad()
def test_a_prompt_fed_in_pieces_gives_the_same_logits() -> None:
    model, rows = build(), tokens(2, 12)
    whole = model(rows).logits
    first = model(rows[:, :5], use_cache=True)
    second = model(rows[:, 5:11], past_key_values=first.past_key_values, use_cache=True)
    third = model(rows[:, 11:], past_key_values=second.past_key_values, use_cache=True)
    pieces = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=TOLERANCE * float(whole.abs().max()))


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    model, row = build(), tokens(1, 9)
    padded = torch.cat([torch.full((1, 4), 2), row], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    alone, within = model(row).logits, model(padded, attention_mask=mask).logits
    torch.testing.assert_close(within[:, 4:], alone, rtol=0, atol=TOLERANCE * float(alone.abs().max()))
    assert bool(within.isfinite().all())
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(row, attention_mask=torch.ones_like(row), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 4:], expected)


@torch.no_grad()
def test_sampling_depends_on_the_seed_alone() -> None:
    model, row = build(), tokens(1, 4)

    def sampled(seed: int) -> list[int]:
        torch.manual_seed(seed)
        options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
        ids: list[int] = model.generate(row, attention_mask=torch.ones_like(row), **options)[0].tolist()
        return ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_the_loss_is_the_mean_over_the_labels_that_count_and_reaches_every_weight() -> None:
    model, rows = build(), tokens(2, 10)
    labels = rows.clone()
    labels[0, :6] = -100
    output = model(rows, labels=labels)
    logs = output.logits.log_softmax(-1)
    counted = [logs[b, t, rows[b, t + 1]] for b in range(2) for t in range(9) if labels[b, t + 1] != -100]
    torch.testing.assert_close(output.loss, -torch.stack(counted).mean())
    output.loss.backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_saving_and_loading_keeps_every_bit(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    loaded = CrystalCoderForCausalLM.from_pretrained(tmp_path)
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.config.mup_scale_qk_dot_by_d is True


def test_new_models_start_as_crystal_did() -> None:
    shape = {"vocab_size": 500, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_inner": 682, "rotary_dim": 16}
    config = CrystalCoderConfig(**shape, mup_width_scale=0.0625)
    block: Any = CrystalCoderForCausalLM(config).transformer.h[0]
    for linear, std in ((block.attn.c_attn, 0.01825), (block.mlp.c_fc2, 0.01825), (block.mlp.c_proj, 0.01825 / 2)):
        assert isinstance(linear, Conv1D)
        # A normal cut at two standard deviations keeps 0.88 of its own.
        assert float(linear.weight.detach().std()) == pytest.approx(0.88 * std, rel=0.02)
        assert not linear.bias.any()


def test_what_a_config_does_not_say_is_as_in_a_conversion() -> None:
    config = CrystalCoderConfig(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    said = {key: config.to_dict()[key] for key in ("activation_function", "position_embedding_type")}
    sizes = {key: config.to_dict()[key] for key in ("vocab_size", "n_embd", "n_layer", "n_head", "rotary_dim")}
    shape, _ = by_name("crystalcoder").read_config({**said, **sizes})
    assert shape.mup is None and shape.model.ffn == config.n_inner == 128
    factors = (config.mup_embeddings_scale, config.mup_output_alpha, config.mup_width_scale)
    assert factors == (1, 1, 1) and config.mup_scale_qk_dot_by_d is False
    assert CrystalCoderForCausalLM(config).transformer.h[0].mlp.c_fc.weight.shape == (32, 128)


def test_hidden_states_come_on_request_one_more_than_blocks() -> None:
    states = build()(tokens(1, 3), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 3, 32)] * 3


def test_a_config_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="only swiglu, rotary"):
        CrystalCoderConfig(activation_function="gelu")
