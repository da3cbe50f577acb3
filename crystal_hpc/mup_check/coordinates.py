"""The coordinate check: how large activations are, and how far each step of training moves them.

Under muP neither depends on the width; without it, what wide models do in one step grows with their width, and the
learning rate must shrink for it. (muP paper, arXiv 2203.03466, appendix D.1.)
"""

from collections.abc import Iterator
from typing import Any

import torch

from crystal_hpc.data.batches import StepBatch
from crystal_hpc.model.backend import device
from crystal_hpc.train import sharding
from crystal_hpc.train.step import Trainer

Sizes = dict[str, float]


class Probe:
    """The activations of a model on one batch that stays the same while the model is trained on others."""

    def __init__(self, trainer: Trainer, batch: StepBatch) -> None:
        """`batch`: its first micro-batch is used. The model must be whole on this rank."""
        self._model = trainer.model
        self._tokens = batch.tokens[0].to(device())
        self._seen: dict[str, torch.Tensor] = {}
        for name, part in _parts(sharding.module(trainer)):
            part.register_forward_hook(self._keep(name))
        self._start = self._look()

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Mean absolute value of each activation as it is now, and of its difference from that at the start."""
        now = self._look()
        changes = {name: (now[name] - self._start[name]).abs().mean().item() for name in now}
        return {name: tensor.abs().mean().item() for name, tensor in now.items()}, changes

    @torch.no_grad()
    def _look(self) -> dict[str, torch.Tensor]:
        self._seen = {}
        self._model.eval()
        positions = torch.arange(self._tokens.shape[1], device=self._tokens.device).expand_as(self._tokens)
        self._model(input_ids=self._tokens, position_ids=positions, attention_mask=None)
        self._model.train()
        return self._seen

    def _keep(self, name: str) -> Any:
        def keep(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if not module.training:
                # Linear layers of Megatron's give their bias apart, for the caller to add.
                value, bias = output if isinstance(output, tuple) else (output, None)
                self._seen[name] = (value if bias is None else value + bias).detach().float().clone()

        return keep


def _parts(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """What is measured, in the order of the forward pass."""
    yield "embedding", model.embedding
    for number, layer in enumerate(model.decoder.layers, 1):
        yield f"layer {number} attention", layer.self_attention
        yield f"layer {number} MLP", layer.mlp
    yield "final norm", model.decoder.final_layernorm
    yield "logits", model.output_layer
