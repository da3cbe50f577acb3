"""The loss of a batch, whole or shared by context-parallel ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crystal_hpc.model.loss import mean_loss, share_of_sequence


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_what_context_parallel_ranks_compute_is_together_the_loss_and_gradient_of_the_whole(
    size: int, masked: bool
) -> None:
    losses = torch.rand(3, 16, dtype=torch.float64).requires_grad_()
    mask = torch.rand(3, 16) < 0.7 if masked else None
    whole, _ = mean_loss(losses, mask)
    (expected,) = torch.autograd.grad(whole, losses)
    parts, gradient, seen = [], torch.zeros_like(losses), []
    for rank in range(size):
        layout: Any = SimpleNamespace(context_rank=rank, context_size=size)
        seen.append(share_of_sequence(torch.arange(16).expand(3, 16), layout)[0].tolist())
        own = None if mask is None else share_of_sequence(mask, layout)
        loss, reported = mean_loss(share_of_sequence(losses, layout), own, size)
        assert reported["loss"] == loss
        parts.append(float(loss.detach()))
        gradient += torch.autograd.grad(loss * size, losses)[0] / size  # as Megatron's schedule and reduction do
    assert sum(parts) == pytest.approx(float(whole.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
    assert sorted(sum(seen, [])) == list(range(16))
    assert seen[0][0] == 0 and seen[0][-1] == 15, "of the pieces, the first from either end"
