"""From a micro-batch to its loss, in the form that Megatron's pipeline schedules call.

The loss is the sum of the negative log-likelihoods of the labels that count, divided by all positions of the batch, as
Crystal's was (sum / (batch size * sequence length), padding not discounted): so a row weighs by the labels it trains,
and the loss of a step does not depend on how its rows are dealt out. Micro-batches are equal: a mean of means is the
mean.
"""

from collections.abc import Callable, Iterator
from functools import partial
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
    mask = batch.get("loss_mask")
    return output, mean_loss if mask is None else partial(mean_loss, mask=mask.to(device()))


def mean_loss(losses: torch.Tensor, mask: torch.Tensor | None = None) -> LossOutput:
    """Mean of per-token losses (micro-batch, sequence_length): to differentiate, and to report.

    `mask`, bool of the same shape: where it is False the loss counts as zero, but the position is counted.
    """
    loss = (losses.float() if mask is None else losses.float() * mask).mean()
    # A copy: Megatron's schedule divides the loss in place by the number of micro-batches.
    return loss, {"loss": loss.detach().clone()}


def total(reported: list[Any]) -> float:
    """Sum of the micro-batches' reported losses; 0 on stages that do not see the loss."""
    return sum(float(entry["loss"]) for entry in reported)
