"""From a micro-batch to its loss, in the form that Megatron's pipeline schedules call.

The loss is the sum of the negative log-likelihoods of the labels that count, divided by all positions of the batch, as
Crystal's was (sum / (batch size * sequence length), padding not discounted): so a row weighs by the labels it trains,
and the loss of a step does not depend on how its rows are dealt out. Micro-batches are equal: a mean of means is the
mean. Where context-parallel ranks share a row, each has two pieces of it, and the row's loss is the sum of theirs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from crystal_hpc.model.backend import device
from crystal_hpc.model.parallel import Layout

LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]


def forward_step(
    layout: Layout, micro_batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossOutput]]:
    """Megatron's `forward_step_func`, once it has its layout: the model's output, and what makes a loss of it."""
    batch = next(micro_batches)
    positions = torch.arange(batch["tokens"].shape[1], device=device()).expand_as(batch["tokens"])
    mine = {name: _on_device(share_of_sequence(tensor, layout)) for name, tensor in batch.items()}
    mine["positions"] = share_of_sequence(positions, layout)
    output = model(input_ids=mine["tokens"], position_ids=mine["positions"], attention_mask=None, labels=mine["labels"])
    return output, partial(mean_loss, mask=mine.get("loss_mask"), shared_by=layout.context_size)


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """From host memory; to a GPU by way of page-locked memory, so that nobody waits for what is queued there."""
    if device().type != "cuda":
        return tensor
    return tensor.pin_memory().to(device(), non_blocking=True)


def share_of_sequence(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """This rank's pieces of rows (micro-batch, sequence_length), whole where no others share them.

    Of 2 C equal pieces, context-parallel rank r of C has the r-th from either end: under a causal mask all then have
    the same work. Transformer Engine's attention and Megatron's rotary positions count on this order.
    """
    if layout.context_size == 1:
        return rows
    pieces = rows.chunk(2 * layout.context_size, dim=1)
    return torch.cat([pieces[layout.context_rank], pieces[-1 - layout.context_rank]], dim=1)


def mean_loss(losses: torch.Tensor, mask: torch.Tensor | None = None, shared_by: int = 1) -> LossOutput:
    """Mean of per-token losses (micro-batch, sequence_length): to differentiate, and to report.

    `mask`, bool of the same shape: where it is False the loss counts as zero, but the position is counted. Of rows that
    are `shared_by` ranks it is this rank's part of the mean; Megatron's schedule, which multiplies what it
    differentiates by their number, and its mean of the gradients over them then make the gradient of the whole.
    """
    loss = (losses.float() if mask is None else losses.float() * mask).mean() / shared_by
    # A copy: Megatron's schedule divides the loss in place by the number of micro-batches.
    return loss, {"loss": loss.detach().clone()}


def total(reported: list[Any]) -> float:
    """Sum of the micro-batches' reported losses; 0 on stages that do not see the loss."""
    return sum(float(entry["loss"]) for entry in reported)
