"""The model's tensors of a checkpoint, one at a time, without Megatron, process groups or a GPU.

Megatron's torch_dist files are read through torch.distributed.checkpoint's own reader: of a stack of layers only the
layer asked for, of the optimizer nothing. `weights` exports from here.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import CheckpointError

MANIFEST = "manifest.json"  # as train.checkpoint writes it; importing that would import Megatron

_OPTIMIZER = ("optimizer.", "chained_")
_LAYERS = "decoder.layers."
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError)


class _OneTensor(LoadPlanner):
    """The plan to fill one tensor with what a checkpoint holds from `start` on."""

    def __init__(self, target: Tensor, key: str, stored: TensorStorageMetadata, start: torch.Size) -> None:
        self._target = target
        chunk = ChunkStorageMetadata(start, target.size())
        self.plan = LoadPlan(create_read_items_for_chunk_list(key, stored, [chunk]))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the part was written in place."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing to do: `__init__` did it."""

    def create_local_plan(self) -> LoadPlan:
        return self.plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a tensor is not stored as bytes")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor of the model is: under a key of its own, or one layer of a stack."""

    key: str
    metadata: TensorStorageMetadata
    layer: int | None = None

    @property
    def shape(self) -> torch.Size:
        return self.metadata.size if self.layer is None else self.metadata.size[1:]


class CheckpointReader:
    """The model's tensors in one complete checkpoint of a run, by their name in the whole model.

    `manifest`: what `train.checkpoint` wrote beside them. Raises CheckpointError where the folder is no complete
    checkpoint, or belongs to a run with another config.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder, run)
        self._reader = FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except _UNREADABLE as error:
            raise CheckpointError(f"{folder}: its .metadata cannot be read ({error})") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = dict(_model_tensors(metadata))

    def names(self) -> list[str]:
        """Such as `decoder.layers.3.mlp.linear_fc2.weight`, in no particular order."""
        return list(self._stored)

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        return self._stored[name].shape

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype it was saved in. Raises CheckpointError where its bytes cannot be read."""
        stored = self._stored[name]
        layered = stored.layer is not None
        shape = torch.Size((1, *stored.shape)) if layered else stored.shape
        start = torch.Size((stored.layer or 0, *(0 for _ in shape[1:])))
        target = torch.empty(shape, dtype=stored.metadata.properties.dtype)
        planner = _OneTensor(target, stored.key, stored.metadata, start)
        try:
            self._reader.read_data(planner.plan, planner).wait()
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.folder}: {name} cannot be read ({reason}); use another checkpoint") from error
        return target[0] if layered else target


def _model_tensors(metadata: Metadata) -> Iterator[tuple[str, _Stored]]:
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or key.startswith(_OPTIMIZER):
            continue
        inside = key.removeprefix(_LAYERS)
        if key == inside or inside.split(".")[0].isdigit():
            yield key, _Stored(key, stored)
        else:  # Megatron stacks the layers of a homogeneous model: the first axis is the layer
            for layer in range(stored.size[0]):
                yield f"{_LAYERS}{layer}.{inside}", _Stored(key, stored, layer)


def _read_manifest(folder: Path, run: Run) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint; name a folder like checkpoints/<phase>/step_00001500")
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = files.read_json(path)
        digest, sizes = manifest["digest"], {name: about["bytes"] for name, about in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, so it is no checkpoint, or its saving was cut short; name a complete one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); use another checkpoint") from error
    if digest != derive.run_digest(run):
        raise CheckpointError(f"{folder}: belongs to a run with another config; give the run.yaml it was trained with")
    for name, size in sizes.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != size:
            raise CheckpointError(f"{folder / name}: missing or not of its {size} bytes; use another checkpoint")
    return manifest
