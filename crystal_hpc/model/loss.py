"""From a micro-batch to its loss, in the form that Megatron's pipeline schedules call.

The loss is the mean negative log-likelihood over all positions of the batch, as Crystal's was (sum / (batch size *
sequence length), padding not discounted). Micro-batches are equal, so a mean of means is the mean.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from crystal_hpc.model.backend import device

LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]


def forward_step(
    micro_batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossOutput]]:
    """Megatron's `forward_step_func`: the model's output, and the function that makes a loss of it."""
    batch = next(micro_batches)
    tokens, labels = batch["tokens"].to(device()), batch["labels"].to(device())
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    output = model(input_ids=tokens, position_ids=positions, attention_mask=None, labels=labels)
    return output, mean_loss


def mean_loss(losses: torch.Tensor) -> LossOutput:
    """Mean of per-token losses (micro-batch, sequence_length): to differentiate, and to report."""
    loss = losses.float().mean()
    # A copy: Megatron's schedule divides the loss in place by the number of micro-batches.
    return loss, {"loss": loss.detach().clone()}


def total(reported: list[Any]) -> float:
    """Sum of the micro-batches' reported losses; 0 on stages that do not see the loss."""
    return sum(float(entry["loss"]) for entry in reported)
