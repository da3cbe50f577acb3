"""Imports Hugging Face folders with all that `--verify all` does, and reads them as Megatron itself reads checkpoints.

Usage: conversion_worker.py FOLDER NAME...; each FOLDER/NAME becomes FOLDER/NAME-weights. One start of Megatron serves
all tests; what it saw is in FOLDER/verified.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from crystal_hpc.config.compute import Parallel
from crystal_hpc.convert.export import Options, import_folder
from crystal_hpc.convert.from_hf import opened
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.errors import CrystalError
from crystal_hpc.model import gpt, parallel


def read_by_megatron(folder: Path, name: str) -> dict[str, Any]:
    """The norm of each tensor that Megatron loads into its own model, and how many there are."""
    with opened(folder / name) as source:
        run = source.run().model_copy(update={"parallel": Parallel()})
    layout = parallel.start(run, 0, 1, 0, folder / f"{name}.store")
    try:
        model: Any = gpt.build(run, layout)
        # What layers may keep beside their tensors (FP8 scales) is nothing here, and not in the file.
        wanted = {key: one for key, one in model.sharded_state_dict().items() if not isinstance(one, ShardedObject)}
        loaded = dist_checkpointing.load({"model": wanted}, str(folder / f"{name}-weights"))
        model.load_state_dict(loaded["model"], strict=False)
        norms = sorted(float(parameter.detach().double().norm()) for parameter in model.parameters())
    finally:
        parallel.stop()
    reader = CheckpointReader(folder / f"{name}-weights", run)
    ours = sorted(float(reader.read(tensor).double().norm()) for tensor in reader.names())
    return {"megatron": norms, "ours": ours}


def main(folder: Path, names: list[str]) -> None:
    seen = {}
    for name in names:
        try:
            said = import_folder(folder / name, folder / f"{name}-weights", None, Options(shard_bytes=50_000))
            seen[name] = {"said": said, **read_by_megatron(folder, name)}
        except CrystalError as error:
            seen[name] = {"error": str(error)}
    (folder / "verified.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
