"""Generations made for tests: real files, written and described as a save does it, of a model of a few numbers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.train.distcp import Chunk, FileWriter, write_index
from crystal_hpc.train.generations import generation_folder, mark_verified
from crystal_hpc.train.manifest import FileEntry, Manifest, TensorEntry, Why
from crystal_hpc.train.state import Position

Tensors = dict[str, Tensor]
EMBEDDING, NORM, GATE = "embedding.word_embeddings.weight", "final_layernorm.weight", "mlp.linear_fc1.weight"


def tensors(seed: int = 1) -> Tensors:
    """A model of two layers, by keys of the files: the layers stacked; and the moments of Adam."""
    chance = torch.Generator().manual_seed(seed)
    model = {EMBEDDING: (24, 8), f"decoder.layers.{GATE}": (2, 16, 8), f"decoder.{NORM}": (8,)}
    made = {key: torch.randn(shape, generator=chance) for key, shape in model.items()}
    moments = {f"optimizer.state.{name}.{key}": made[key] ** 2 for name in ("exp_avg", "exp_avg_sq") for key in model}
    return made | moments


def unstacked(made: Tensors) -> Tensors:
    """The model's tensors by the names that the manifest has: each layer's its own."""
    found = {}
    for key, tensor in made.items():
        if key.startswith("optimizer."):
            continue
        if key.startswith("decoder.layers."):
            for number, layer in enumerate(tensor):
                found[f"decoder.layers.{number}.{key.removeprefix('decoder.layers.')}"] = layer
        else:
            found[key] = tensor
    return found


def write_tensors(folder: Path, made: Tensors, ranks: int = 2) -> dict[str, FileEntry]:
    """The files of a generation, each tensor's rows shared out among so many ranks."""
    folder.mkdir(parents=True)
    written = []
    for rank in range(ranks):
        writer = FileWriter(folder / f"__{rank}_0.distcp")
        for key, tensor in made.items():
            axis = 1 if key.rpartition("decoder.layers.")[1] else 0
            size = tensor.shape[axis] // ranks
            part = tensor.narrow(axis, rank * size, size).contiguous()
            offset = tuple(rank * size if at == axis else 0 for at in range(tensor.ndim))
            writer.add(Chunk(key, tuple(tensor.shape), offset, part))
        written.append(writer.close())
    write_index(folder, [placed for one in written for placed in one.placed])
    return {
        path.name: FileEntry(path.stat().st_size, files.digest_file(path)) for path in sorted(folder.iterdir())
    }  # fmt: skip


def made_manifest(run: Run, position: Position, **changes: Any) -> Manifest:
    """What a periodic save by two ranks would say, of no files and no tensors."""
    phase = run.phases[position.phase].name
    said: dict[str, Any] = {
        "kind": "training", "run": run.name, "digest": derive.run_digest(run), "phase": phase, "step": position.step,
        "tokens": position.tokens(run), "why": "periodic", "layout": {"ranks": 2, **run.parallel.model_dump()},
        "precision": run.precision, "ledger": {phase: {"prose": {"samples": 8, "tokens": 128}}},
        "optimizer": {"steps": position.step}, "files": {}, "tensors": {}, "commit": None,
        "versions": {"torch": torch.__version__}, "created": time.time(), "seconds": 0.5,
    }  # fmt: skip
    return Manifest(**said | changes)


def make_generation(
    run_folder: Path, run: Run, position: Position, why: Why = "periodic", verified: bool = False,
    made: Tensors | None = None, folder: Path | None = None, ranks: int = 2, **changes: Any,
) -> Path:  # fmt: skip
    """Writes a complete generation of the run; `changes` are to its manifest."""
    place = folder or generation_folder(run_folder, run, position)
    made = tensors() if made is None else made
    entries = write_tensors(place, made, ranks)
    described = {
        name: TensorEntry(tuple(tensor.shape), "float32", float(tensor.double().norm()))
        for name, tensor in unstacked(made).items()
    }
    made_manifest(run, position, **{"why": why, "files": entries, "tensors": described} | changes).write(place)
    if verified:
        mark_verified(place, "a test")
    return place


def changed(path: Path, change: Callable[[bytearray], object]) -> None:
    """Changes a file's bytes in place."""
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
