"""Those that take turns in `gpu.py`: this package's train step, a bare Megatron-core loop, and plain PyTorch.

A contestant is built, makes some steps, and gives all its memory back before the next is built: of the widest shape
only one fits a GPU at a time.
"""

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gpu_plain
import numpy as np
import torch

from crystal_hpc.config import derive, memory
from crystal_hpc.config.compute import Fp8
from crystal_hpc.config.schema import Run
from crystal_hpc.data.batches import StepBatch
from crystal_hpc.model import backend, gpt, mup, parallel, precision
from crystal_hpc.model.machine import probe
from crystal_hpc.train import optim
from crystal_hpc.train.step import Trainer, build_trainer, train_step

with backend.quiet():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

RECIPES = ("delayed", "tensorwise", "blockwise")
RATE = 1e-4
BATCHES = 4
"""Different batches, over and over; their ids are random."""
WARM_UP = 2
"""Steps of each turn that do not count: kernels are compiled, and the optimizer's state is made."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Turn:
    """What a contestant did in one turn."""

    seconds: float
    """Of one step, on average."""
    peak: int
    """Most bytes allocated in the steps that count; 0 on the CPU rig."""
    left_over: int
    """Bytes that were allocated before it was built: 0, but for what libraries keep."""


def names(rig: bool) -> list[str]:
    """The contestants, in the order of an even turn. The rig has no 8-bit products."""
    ours = ["ours bf16"] + [f"ours {recipe}" for recipe in RECIPES if not rig]
    return [*ours, "megatron bf16", "plain bf16"]


def run_of(name: str, run: Run) -> Run:
    """The run of a contestant: in bfloat16, or with a recipe of 8-bit products."""
    recipe = name.rpartition(" ")[2]
    fp8 = Fp8(recipe=recipe) if recipe in RECIPES else None  # type: ignore[arg-type]
    return run.model_copy(update={"fp8": fp8, "precision": "fp32" if recipe == "fp32" else "bf16"})


def take_turn(name: str, run: Run, layout: parallel.Layout, steps: int) -> Turn:
    """Builds a contestant, lets it make its steps, and clears away after it."""
    cuda = backend.device().type == "cuda"
    clear()  # of what one that failed has left
    left_over = torch.cuda.memory_allocated()
    step, holders = _build(name, run_of(name, run), layout, cuda)
    try:
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        peak = 0
        began = time.perf_counter()
        for _ in range(steps):
            step()
            peak = max(peak, torch.cuda.max_memory_allocated() if cuda else 0)  # ours begins to count anew in each step
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / steps
        return Turn(seconds, peak, left_over)
    finally:
        del step
        release(holders)


def _build(name: str, run: Run, layout: parallel.Layout, cuda: bool) -> tuple[Step, list[Any]]:
    who = name.partition(" ")[0]
    if who == "plain":
        return gpu_plain.build(run, _on_device(run), compiled=cuda)
    if who == "megatron":
        return _megatron(run)
    trainer, number = build_trainer(run, layout), 0
    batches = random_batches(run)

    def step() -> None:
        nonlocal number
        train_step(trainer, batches[number % BATCHES], RATE, [0, 0])
        number += 1

    return step, holders_of(trainer)


def holders_of(trainer: Trainer) -> list[Any]:
    """What of a trainer has memory on the device."""
    return [trainer.model, *optim._inner_optimizers(trainer.optimizer)]


def random_batches(run: Run) -> list[StepBatch]:
    """In host memory, as our loop gets them."""
    phase, micro_batch = run.phases[0], run.parallel.micro_batch
    shape = BATCHES, derive.micro_batches(run, phase, 1), micro_batch, phase.sequence_length + 1
    rows = torch.from_numpy(np.random.default_rng(1).integers(0, run.model.vocab_size, shape))
    return [StepBatch(row[..., :-1].contiguous(), row[..., 1:].contiguous()) for row in rows]


def _on_device(run: Run) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The same rows, on the device before the first step, as the peers' examples have them."""
    device = backend.device()
    return [
        [(micro["tokens"].to(device), micro["labels"].to(device)) for micro in batch] for batch in random_batches(run)
    ]


@contextlib.contextmanager
def quick_weights() -> Iterator[None]:
    """Has models drawn on the device: the same distribution, other numbers, and seconds less for each build.

    Speed does not depend on them; where losses are compared, they are not drawn so.
    """

    def draw(shape: list[int], std: float, key: int) -> torch.Tensor:
        chance = torch.Generator(backend.device()).manual_seed(key % 2**63)
        weights = torch.empty(shape, device=backend.device())
        return torch.nn.init.trunc_normal_(weights, std=std, a=-2 * std, b=2 * std, generator=chance)

    ours, mup.truncated_normal = mup.truncated_normal, draw
    try:
        yield
    finally:
        mup.truncated_normal = ours


def _megatron(run: Run) -> tuple[Step, list[Any]]:
    """Megatron-core's GPTModel, wrappers, optimizer and schedule, put together as its examples do it."""
    model, phase, micro_batch = _bare_model(run), run.phases[0], run.parallel.micro_batch
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=RATE,
            min_lr=RATE,
            weight_decay=run.optimizer.weight_decay,
            adam_beta1=run.optimizer.beta1,
            adam_beta2=run.optimizer.beta2,
            adam_eps=run.optimizer.epsilon,
            clip_grad=run.optimizer.clip_grad,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=run.parallel.distributed_optimizer,
            overlap_param_gather=run.parallel.overlap_parameters,
        ),
        [model],
    )
    batches = _endless(run)

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    def forward_step(data: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens, positions, labels = next(data)
        return model(tokens, positions, None, labels=labels), mean_loss

    def step() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=derive.micro_batches(run, phase, 1),
            seq_length=phase.sequence_length,
            micro_batch_size=micro_batch,
            forward_only=False,
        )
        optimizer.step()
        sum(float(entry["loss"]) for entry in losses)  # any loop looks at its loss

    return step, [model, *optim._inner_optimizers(optimizer)]


def _bare_model(run: Run) -> DistributedDataParallel:
    """Fused kernels as Megatron's own training script has them, and Transformer Engine's loss, as in our own step (of
    which Megatron 0.19.2 warns); muP's multipliers by our hooks.
    """
    model, cuda = run.model, backend.device().type == "cuda"
    with backend.quiet():
        config = TransformerConfig(
            num_layers=model.layers,
            hidden_size=model.hidden,
            num_attention_heads=model.heads,
            ffn_hidden_size=memory.padded_ffn(run),
            layernorm_epsilon=model.norm_epsilon,
            add_bias_linear=model.bias,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            rotary_interleaved=model.rotary_interleaved,
            softmax_scale=derive.attention_scale(model, run.mup),
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            use_cpu_initialization=not cuda,
            apply_rope_fusion=cuda,
            bias_activation_fusion=cuda,
            bias_dropout_fusion=cuda,
            cross_entropy_loss_fusion=cuda,
            cross_entropy_fusion_impl="te" if cuda else "native",
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )
    if cuda:
        layers: Any = get_gpt_layer_with_transformer_engine_spec()
    else:
        layers = gpt._layers(config, precision.choose(run, probe()))
    module = GPTModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=model.vocab_size,
        max_sequence_length=run.phases[0].sequence_length,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.rotary_fraction,
        rotary_base=model.rotary_base,
    ).to(backend.device())
    for part in module.modules():
        if hasattr(part, "fuse_wgrad_accumulation"):
            part.fuse_wgrad_accumulation = True  # as where apex is installed, without which Megatron refuses the option
    gpt._scale_ends(module, run)
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        overlap_grad_reduce=run.parallel.overlap_gradients,
        overlap_param_gather=run.parallel.overlap_parameters,
    )
    wrapped = DistributedDataParallel(config, options, Float16Module(config, module))
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped.no_sync
    return wrapped


def _endless(run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    batches = _on_device(run)
    positions = torch.arange(run.phases[0].sequence_length, device=backend.device())
    positions = positions.expand(run.parallel.micro_batch, -1)
    while True:
        for batch in batches:
            for tokens, labels in batch:
                yield tokens, positions, labels


def release(holders: list[Any]) -> None:
    """Gives back the memory of models and optimizers, whoever may still point to them."""
    for holder in holders:
        for tensor in list(_tensors(holder)):
            tensor.untyped_storage().resize_(0)
        if isinstance(holder, torch.nn.Module):
            for module in holder.modules():
                getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's 8-bit copies of weights
    holders.clear()
    clear()


def clear() -> None:
    """Forgets what Transformer Engine keeps of models, and what nobody points to."""
    if backend.device().type == "cuda" and probe().transformer_engine:
        importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _tensors(holder: Any) -> Iterator[torch.Tensor]:
    """Those that a model, its gradient buffers or an optimizer keep from step to step."""
    if isinstance(holder, torch.optim.Optimizer):
        for state in holder.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        for group in holder.param_groups:
            yield from group["params"]
        return
    for buffer in getattr(holder, "buffers", []) if isinstance(holder, DistributedDataParallel) else []:
        yield from (data for data in (buffer.grad_data, buffer.param_data) if data is not None)
    for parameter in holder.parameters():
        yield parameter.data
        if parameter.grad is not None:
            yield parameter.grad
