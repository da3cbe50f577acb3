"""One of two ranks that save the same weights under each layout; rank 0 then exports and verifies, alone.

Usage: megatron_worker.py RANK FOLDER; one start of Megatron serves all the tests of this folder.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from crystal_hpc.config.load import load_run
from crystal_hpc.convert import weights
from crystal_hpc.convert.verify import verify
from crystal_hpc.data.batches import StepBatch
from crystal_hpc.data.order import run_orders
from crystal_hpc.errors import CrystalError
from crystal_hpc.model import parallel
from crystal_hpc.train import sharding, step
from crystal_hpc.train.checkpoint import Saver
from crystal_hpc.train.generations import generation_folder
from crystal_hpc.train.restore import load_weights
from crystal_hpc.train.state import Position

LAYOUTS = {
    "plain": [],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "bf16": ["precision=bf16", "parallel.distributed_optimizer=true"],
}
STEP = Position(0, 3)


def save(name: str, rank: int, folder: Path) -> None:
    run = load_run(folder / "run.yaml", LAYOUTS[name])
    layout = parallel.start(run, rank, 2, rank, folder / f"{name}.store")
    trainer = step.build_trainer(run, layout)
    # One step, so that the optimizer has state of its own to save beside the weights.
    rows = torch.arange(2 * 2 * 49).reshape(2, 2, 49) % 125
    step.train_step(trainer, StepBatch(rows[..., :-1].contiguous(), rows[..., 1:].contiguous()), 1e-3, [])
    model: Any = sharding.module(trainer)
    if layout.tensor_size == 1 and layout.first_stage and layout.last_stage:
        # Whole on each rank: the same noise everywhere, so that no bias is zero and no norm is one.
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    else:
        plain = generation_folder(folder / "plain", run, STEP)
        load_weights(model, plain, layout.comm)
    Saver(trainer, folder / name, run_orders(run, {"prose": 1000})).save(STEP, "periodic")
    parallel.stop()


def compare(folder: Path, layout: str, dtype: weights.Dtype, spoil: bool = False) -> dict[str, Any]:
    """What `verify` says of an export: its result, or its error."""
    run = load_run(folder / "run.yaml", LAYOUTS[layout])
    saved = generation_folder(folder / layout, run, STEP)
    out = folder / "exports" / f"{layout}-{dtype}-{spoil}"
    weights.export(saved, run, None, out, dtype)
    if spoil:
        swap_gate_and_value(out / "model.safetensors")
    try:
        return dataclasses.asdict(verify(saved, run, out))
    except CrystalError as error:
        return {"error": str(error)}


def swap_gate_and_value(path: Path) -> None:
    tensors = load_file(path)
    gate, value = (f"transformer.h.1.mlp.{name}.weight" for name in ("c_fc2", "c_fc"))
    tensors[gate], tensors[value] = tensors[value], tensors[gate]
    save_file(tensors, path, metadata={"format": "pt"})


def main(rank: int, folder: Path) -> None:
    for name in LAYOUTS:
        save(name, rank, folder)
    if rank == 0:
        (folder / "exports").mkdir()
        results = {
            "plain": compare(folder, "plain", "float32"),
            "tensor": compare(folder, "tensor", "float32"),
            "plain in bfloat16": compare(folder, "plain", "bfloat16"),
            "bf16": compare(folder, "bf16", "bfloat16"),
            "spoiled": compare(folder, "plain", "float32", spoil=True),
        }
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
