"""One optimizer step, and one evaluation pass: Megatron's schedules, driven with our batches.

`loop` calls this for every step; from here a batch goes through `model.gpt` and `model.loss` and comes back as numbers
that all ranks agree on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from crystal_hpc.config.schema import Run
from crystal_hpc.data.batches import StepBatch
from crystal_hpc.log import log
from crystal_hpc.model import backend, gpt, loss, precision
from crystal_hpc.model.machine import probe
from crystal_hpc.model.parallel import Layout
from crystal_hpc.train import measure, optim

with backend.quiet():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func


@dataclass(frozen=True)
class Trainer:
    """What a step needs: this rank's part of the model, and its optimizer."""

    run: Run
    layout: Layout
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    used: precision.Used
    """Number formats and kernels."""
    clock: measure.Clock = field(default_factory=measure.SilentClock)


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step."""

    loss: float
    """Mean over all positions of the step, nats; see `model.loss`."""
    grad_norm: float
    digest: int
    """Of the rows that all ranks together consumed; see `data.batches`."""
    votes: list[int]
    """Sums over the ranks of the votes given to `train_step`."""
    measured: dict[str, float]
    """On rank 0, what its clock has read; see `measure`."""


def build_trainer(run: Run, layout: Layout) -> Trainer:
    """Model and optimizer as they stand before the first step. Raises BackendError for what the machine lacks."""
    machine = probe()
    used = precision.choose(run, machine)
    log.info("computing on %s", used.line())
    module = gpt.build(run, layout, machine)
    config = module.config
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        overlap_grad_reduce=run.parallel.overlap_gradients,
        overlap_param_gather=run.parallel.overlap_parameters,
    )
    model = DistributedDataParallel(config, options, module)
    clock = measure.clock(layout.comm.rank)
    config.finalize_model_grads_func = _timed(finalize_model_grads, clock)
    config.no_sync_func = model.no_sync
    return Trainer(run, layout, model, optim.build(run, model), used, clock)


def _timed(finalize: Callable[..., None], clock: measure.Clock) -> Callable[..., None]:
    """What Megatron's schedules call after the last backward pass, for the gradients that are still to be reduced."""

    def timed(*arguments: Any, **options: Any) -> None:
        clock.mark("forward_backward")
        finalize(*arguments, **options)

    return timed


def train_step(
    trainer: Trainer,
    batch: StepBatch,
    rate: float,
    votes: list[int],
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward, backward and update over one step's batch; then the ranks share loss, digest and votes.

    `before_update` is called when the weights are about to change: a save may still be copying them.
    """
    clock = trainer.clock
    clock.start()
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    optim.set_learning_rate(trainer.optimizer, rate, trainer.run)
    reported = _run_schedule(trainer, batch, forward_only=False)
    clock.mark("gradient_sync")
    before_update()
    clock.mark("save_wait")
    _, grad_norm, _ = trainer.optimizer.step()
    clock.mark("optimizer")
    layout = trainer.layout
    digest = batch.digest if layout.speaks_for_its_rows else 0
    digest, *votes = layout.comm.sum([digest, *votes])
    mean = mean_over_ranks(layout, loss.total(reported) / len(batch.tokens))
    return StepResult(mean, float(grad_norm or 0.0), digest, votes, clock.read())


@torch.no_grad()
def evaluate_micro_batch(trainer: Trainer, batch: StepBatch) -> float:
    """Mean loss over a batch of one micro-batch of every data-parallel rank."""
    trainer.model.eval()
    reported = _run_schedule(trainer, batch, forward_only=True)
    trainer.model.train()
    return mean_over_ranks(trainer.layout, loss.total(reported))


def gather_weights(trainer: Trainer) -> None:
    """Makes the model's weights those after the last step, on every rank, at once. A collective call.

    With `overlap_parameters` they are gathered when the next forward pass wants them; who reads them otherwise calls
    this first. The next forward pass then finds them there, and writes nothing.
    """
    if trainer.run.parallel.overlap_parameters:
        trainer.model.start_param_sync(force_sync=True)


def mean_over_ranks(layout: Layout, value: float) -> float:
    """Mean over the data-parallel ranks of what the last pipeline stage holds, on every rank.

    Of context-parallel ranks each has a part, and the parts are summed.
    """
    mine = value / layout.data_size if layout.last_stage and layout.tensor_rank == 0 else 0.0
    return layout.comm.sum_float(mine)


def _run_schedule(trainer: Trainer, batch: StepBatch, forward_only: bool) -> list[Any]:
    micro_batches, micro_batch, length = batch.tokens.shape
    schedule = get_forward_backward_func()
    result: list[Any] = schedule(
        forward_step_func=partial(loss.forward_step, trainer.layout),
        data_iterator=iter(batch),
        model=[trainer.model],
        num_microbatches=micro_batches,
        seq_length=length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )
    return result
