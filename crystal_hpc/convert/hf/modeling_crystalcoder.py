"""CrystalCoder for Transformers: a GPT-2-like decoder with rotary positions, SwiGLU and muP.

Shapes: B sequences, T new tokens, S tokens in all (cached and new), H heads of D dimensions, E = H * D.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_crystalcoder import CrystalCoderConfig

ROTARY_BASE = 10000


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2 stores it."""

    def __init__(self, inputs: int, outputs: int, residual: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.residual = residual  # its output is added to the residual stream: it starts smaller

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.T, self.bias)


def rotary_angles(positions: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (B, 1, T, dimensions / 2), of int positions (B, T)."""
    # Computed at each call: a buffer of frequencies would be lost where a model is first built without memory.
    exponents = torch.arange(0, dimensions, 2, device=positions.device).float() / dimensions
    angles = positions.float()[:, None, :, None] / ROTARY_BASE**exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of the first dimensions of each head; x is (B, H, T, D)."""
    dimensions = 2 * cosine.shape[-1]
    turned, rest = x[..., :dimensions].float(), x[..., dimensions:]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def attention_mask_for(padding: Tensor | None, past: int, new: int, device: torch.device) -> Tensor | None:
    """What each new token may look at, bool (B, 1, T, S); None where that is simply everything before it.

    `padding`: (B, S), 0 where a token is padding. A padding token sees itself, so that no row is empty.
    """
    if padding is None or bool(padding.all()):
        if past == 0 or new == 1:
            return None
        padding = torch.ones(1, past + new, device=device)
    keys = torch.arange(past + new, device=device)
    queries = torch.arange(past, past + new, device=device)[:, None]
    seen = (keys <= queries) & padding[:, None, None, :].bool()
    return seen | (keys == queries)


class CrystalCoderAttention(nn.Module):
    """Causal attention with fused query, key and value, and rotary positions."""

    def __init__(self, config: CrystalCoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.n_head
        width = config.n_embd // config.n_head
        self.scale = 1 / width if config.mup_scale_qk_dot_by_d else 1 / math.sqrt(width)
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, residual=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, T, E) to (B, T, E)."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=self.scale,
        )
        output: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(-2))
        return output


class CrystalCoderMLP(nn.Module):
    """SwiGLU; `c_fc2` is the gate."""

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.c_fc2 = Conv1D(config.n_embd, config.n_inner)
        self.c_proj = Conv1D(config.n_inner, config.n_embd, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.c_proj(self.c_fc(x) * functional.silu(self.c_fc2(x)))
        return output


class CrystalCoderBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: CrystalCoderConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CrystalCoderAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CrystalCoderMLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, mask, cache)
        output: Tensor = x + self.mlp(self.ln_2(x))
        return output


class CrystalCoderPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the two models share: how weights start, and what Transformers may do with the model."""

    config_class = CrystalCoderConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["CrystalCoderBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_cache_class = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals as in Crystal: matrices shrink with the width (muP), those into the residual more."""
        std = self.config.initializer_range
        if isinstance(module, Conv1D):
            std *= math.sqrt(self.config.mup_width_scale)
            std /= math.sqrt(2 * self.config.n_layer) if module.residual else 1
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            return
        if isinstance(module, Conv1D | nn.Embedding | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


class CrystalCoderModel(CrystalCoderPreTrainedModel):
    """Token ids to final hidden states."""

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(CrystalCoderBlock(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_others: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, E) of int64 `input_ids` (B, T), or of embeddings that are not yet scaled.

        `attention_mask`: (B, S), 0 on padding. `past_key_values` holds the first S - T tokens, and gets the new ones.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = (self.wte(input_ids) if inputs_embeds is None else inputs_embeds) * self.config.mup_embeddings_scale
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past, new = past_key_values.get_seq_length() if past_key_values is not None else 0, x.shape[1]
        if position_ids is None:
            position_ids = _positions(attention_mask, past, new, x.device)
        mask = attention_mask_for(attention_mask, past, new, x.device)
        rotary = rotary_angles(position_ids, self.config.rotary_dim)
        states: tuple[Tensor, ...] = ()
        for block in self.h:
            states = (*states, x) if output_hidden_states else ()
            x = block(x, rotary, mask, past_key_values)
        x = self.ln_f(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
        )


def _positions(padding: Tensor | None, past: int, new: int, device: torch.device) -> Tensor:
    """Positions (B or 1, T) of the new tokens; padding on the left does not count."""
    if padding is None:
        return torch.arange(past, past + new, device=device)[None]
    return (padding.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


class CrystalCoderForCausalLM(CrystalCoderPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Token ids to logits, and to a loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__(config)
        self.transformer = CrystalCoderModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, vocabulary) after each token; the loss is the mean over `labels` (B, T) that are not -100.

        `logits_to_keep`: how many of the last positions to compute logits for, or which; 0 is all. `cache` is what
        Transformers from 5.24 on calls `past_key_values` when it generates.
        """
        past = past_key_values if past_key_values is not None else cache
        output = self.transformer(input_ids, attention_mask, position_ids, past, inputs_embeds, use_cache, **others)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        logits = logits * (self.config.mup_output_alpha * self.config.mup_width_scale)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return result.to_tuple() if return_dict is False else result


CrystalCoderLMHeadModel = CrystalCoderForCausalLM  # its name in the configs published with the paper
