"""Crystal's shape as plain PyTorch would have it: the peer of `gpu.py` that owes nothing to Megatron-core.

Float32 weights, bfloat16 products under autocast, torch's own attention kernels, AdamW in one kernel, blocks and loss
compiled: what a good single-file trainer does today. muP's multipliers are part of the arithmetic, as they are in ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crystal_hpc.config import derive, memory
from crystal_hpc.config.schema import Model, Run

Step = Callable[[], None]


class Block(nn.Module):
    """Norm, attention, norm, SwiGLU; (batch, length, hidden) in and out."""

    def __init__(self, model: Model, ffn: int, scale: float) -> None:
        super().__init__()
        hidden, bias = model.hidden, model.bias
        self.heads, self.scale = model.heads, scale
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(hidden, model.norm_epsilon) for _ in range(2))
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden, bias), nn.Linear(hidden, hidden, bias)
        self.fc1, self.fc2 = nn.Linear(hidden, 2 * ffn, bias), nn.Linear(ffn, hidden, bias)

    def forward(self, stream: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, hidden = stream.shape
        three = self.qkv(self.attention_norm(stream)).view(batch, length, 3, self.heads, hidden // self.heads)
        query, key, value = three.permute(2, 0, 3, 1, 4)
        query, key = rotated(query, cosine, sine), rotated(key, cosine, sine)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        stream = stream + self.proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.fc1(self.mlp_norm(stream)).chunk(2, dim=-1)
        result: Tensor = stream + self.fc2(functional.silu(gate) * up)
        return result


def rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3), ... of the first dimensions turned; (batch, heads, length, dimensions) in and out."""
    width = 2 * cosine.shape[-1]
    first, second = heads[..., 0:width:2], heads[..., 1:width:2]
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)
    return torch.cat([turned.to(heads.dtype), heads[..., width:]], dim=-1)


class Plain(nn.Module):
    """The whole model: the mean loss of a micro-batch."""

    def __init__(self, run: Run, compiled: bool) -> None:
        super().__init__()
        model, length = run.model, run.phases[0].sequence_length
        assert model.norm == "layernorm" and model.tied_embeddings and model.rotary_interleaved
        scale, ffn = derive.attention_scale(model, run.mup), memory.padded_ffn(run)
        self.embedding = nn.Embedding(model.vocab_size, model.hidden)
        self.blocks = nn.ModuleList(Block(model, ffn, scale) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.hidden, model.norm_epsilon)
        self.multipliers = derive.embedding_scale(run.mup), derive.output_scale(model, run.mup)
        width = int(model.hidden // model.heads * model.rotary_fraction)
        angles = torch.outer(torch.arange(length), model.rotary_base ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        # Block by block, as torchtitan compiles: one block's kernels serve all, and it takes seconds, not minutes.
        self.head_loss: Any = torch.compile(self._head_loss, dynamic=False) if compiled else self._head_loss
        for block in self.blocks if compiled else ():
            block.compile(dynamic=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        stream = self.embedding(tokens) * self.multipliers[0]
        for block in self.blocks:
            stream = block(stream, self.cosine, self.sine)
        loss: Tensor = self.head_loss(self.norm(stream), labels)
        return loss

    def _head_loss(self, stream: Tensor, labels: Tensor) -> Tensor:
        logits = functional.linear(stream, self.embedding.weight) * self.multipliers[1]
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def build(run: Run, batches: list[list[tuple[Tensor, Tensor]]], compiled: bool) -> tuple[Step, list[Any]]:
    """A step over the next of the batches (of micro-batches that lie on the device), and what holds its memory."""
    device = batches[0][0][0].device
    with torch.device(device):
        model = Plain(run, compiled)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=1e-4,
        betas=(run.optimizer.beta1, run.optimizer.beta2),
        eps=run.optimizer.epsilon,
        weight_decay=run.optimizer.weight_decay,
        fused=True,
    )
    number = 0

    def step() -> None:
        nonlocal number
        micro_batches = batches[number % len(batches)]
        number += 1
        for tokens, labels in micro_batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(tokens, labels) / len(micro_batches)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, [model, optimizer]
