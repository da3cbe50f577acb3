"""The memory that the config's arithmetic foretells, against that of real models on the CPU rig, and on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rig
import torch

from crystal_hpc.config import memory
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run

MODEL = "model={layers: 4, hidden: 64, heads: 4, ffn: 176, vocab_size: 536, norm: layernorm}"
PHASE = (
    "phases=[{name: prose, sequence_length: 64, batch_size: 8, steps: 1, mixture: {prose: 1.0}, "
    "learning_rate: {peak: 0.01, end: 0.001}}]"
)
LAYOUTS = {
    "one rank": (1, ()),
    "one rank, bfloat16": (1, ("precision=bf16",)),
    "distributed optimizer": (2, ("parallel.distributed_optimizer=true",)),
    "distributed optimizer, bfloat16": (2, ("parallel.distributed_optimizer=true", "precision=bf16")),
    "TP=2": (2, ("parallel.tensor=2",)),
    "TP=2, sequence parallelism": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "attention recomputed": (1, ("recompute.mode=selective",)),
    "feed-forward parts recomputed": (1, ("recompute={mode: selective, modules: [mlp]}",)),
    "three blocks recomputed, bfloat16": (1, ("recompute={mode: full, layers: 3}", "precision=bf16")),
    "PP=2, bfloat16": (2, ("parallel.pipeline=2", "precision=bf16")),
    "PP=2, untied, no biases": (2, ("parallel.pipeline=2", "model.tied_embeddings=false", "model.bias=false")),
}
# Megatron's distributed optimizer begins each parameter at a multiple of 64 elements, and ends the buffer at one of
# 128.
START, END = 64, 128
TOLERANCE = 0.03  # of activations: angles, masks and labels are left out; these models were off by 1.7 % at most


class Kept:
    """Counts the bytes that autograd keeps for a backward pass, each storage once, and their peak."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.users: dict[int, int] = {}
        self.bytes = self.peak = self.at_first_backward = 0

    def pack(self, tensor: torch.Tensor) -> "Entry":
        return Entry(self, tensor.detach())

    def unpack(self, entry: "Entry") -> torch.Tensor:
        self.at_first_backward = self.at_first_backward or self.bytes
        return entry.tensor

    def change(self, tensor: torch.Tensor, by: int) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if place in self.weights:
            return
        before = self.users.get(place, 0)
        self.users[place] = before + by
        self.bytes += size * (bool(before + by) - bool(before))
        self.peak = max(self.peak, self.bytes)


class Entry:
    """One tensor that autograd keeps, until it lets go of it."""

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.change(tensor, 1)

    def __del__(self) -> None:
        self.kept.change(self.tensor, -1)


def batch(run: Run, size: int) -> Any:
    from crystal_hpc.config import derive
    from crystal_hpc.data.batches import StepBatch

    phase = run.phases[0]
    shape = derive.micro_batches(run, phase, size), run.parallel.micro_batch, phase.sequence_length + 1
    rows = torch.randint(0, run.model.vocab_size, shape, device="cpu")
    return StepBatch(rows[..., :-1].contiguous(), rows[..., 1:].contiguous())


def sizes(rank: int, size: int, meeting: str, folder: Path) -> dict[str, int]:
    """Bytes of a real model after a real step."""
    from crystal_hpc.train import optim
    from crystal_hpc.train.step import train_step

    trainer = rig.join(rank, size, meeting, folder)
    kept = Kept(trainer.model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        train_step(trainer, batch(trainer.run, size), 1e-3, [])
    assert kept.bytes == 0, "all that was kept has been let go"
    parameters = list(trainer.model.parameters())
    state = 0
    for parameter, stretch in optim.states(trainer.optimizer):
        mine = (
            [*stretch.state.values()] if parameter.dtype == torch.float32 else [stretch.main, *stretch.state.values()]
        )
        state += sum(tensor.nbytes for tensor in mine if tensor.numel() > 1)
    return {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(buffer.grad_data.nbytes for buffer in trainer.model.buffers),
        "optimizer": state,
        "parameters": len(parameters),
        "kept": kept.at_first_backward,
        "most kept": kept.peak,
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_formulas_give_what_a_real_model_takes(new_run: Callable[..., Path], name: str) -> None:
    size, overrides = LAYOUTS[name]
    folder = new_run("sizes", MODEL, PHASE, *overrides)
    run = load_run(folder / "run.yaml")
    found = rig.values(rig.run_ranks(sizes, size, folder))
    stages = memory.stages(run, run.phases[0], size, gpu=False)
    if len(stages) == 1:
        stages *= size
    distributed = run.parallel.distributed_optimizer
    for real, planned in zip(found, stages, strict=True):
        padding = 4 * (START * real["parameters"] + END) if distributed else 0
        assert real["weights"] == planned.weights
        assert planned.gradients <= real["gradients"] <= planned.gradients + padding
        assert planned.optimizer - padding <= real["optimizer"] <= planned.optimizer + 3 * padding
        sent = memory.Activations(run, run.phases[0], gpu=False).sent(planned.stage)
        assert planned.activations - planned.in_flight * sent == pytest.approx(real["kept"], rel=TOLERANCE)
        if run.recompute.mode == "none":
            assert real["most kept"] == real["kept"], "a step takes no more than its first forward passes"
    if distributed:
        shares = sum(real["optimizer"] for real in found)
        assert shares == pytest.approx(sum(planned.optimizer for planned in stages), abs=size)


GPU = "model={layers: 12, hidden: 768, heads: 12, ffn: 2048, vocab_size: 32032}"
LONG = PHASE.replace("sequence_length: 64", "sequence_length: 2048")


def most_allocated(rank: int, size: int, meeting: str, folder: Path) -> int:
    """Peak bytes of three steps on a GPU."""
    from crystal_hpc.train.step import train_step

    trainer = rig.join(rank, size, meeting, folder)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        train_step(trainer, batch(trainer.run, size), 1e-3, [])
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, to ask it for its peak of memory")
@pytest.mark.parametrize("overrides", [(), ("recompute.mode=full",), ("fp8={recipe: tensorwise}",)])
def test_the_total_is_the_most_that_a_gpu_has_allocated(
    new_run: Callable[..., Path], overrides: tuple[str, ...]
) -> None:
    folder = new_run("gpu", GPU, LONG, "precision=bf16", "parallel.micro_batch=4", *overrides)
    run = load_run(folder / "run.yaml")
    (peak,) = rig.values(rig.run_ranks(most_allocated, 1, folder))
    assert memory.stages(run, run.phases[0], 1)[0].total == pytest.approx(peak, rel=0.1)


def test_the_width_of_the_feed_forward_part_is_padded_as_the_model_pads_it(new_run: Callable[..., Path]) -> None:
    from crystal_hpc.model import precision
    from crystal_hpc.model.machine import Machine

    run = load_run(new_run("padded", "parallel.tensor=2") / "run.yaml")
    assert memory.padded_ffn(run) == precision.choose(run, Machine(gpu="any")).ffn == 256
