"""The model's tensors of a checkpoint, one at a time, without Megatron, process groups or a GPU.

`train.distcp` reads Megatron's torch_dist files: of a stack of layers only the layer asked for, of the optimizer
nothing. `weights` exports from here. A checkpoint is a generation of a run, or weights that `from_hf` brought in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.convert.names import Shape
from crystal_hpc.convert.shapes import as_run, check_same, read_model
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train import distcp
from crystal_hpc.train.keys import is_stack, name_of
from crystal_hpc.train.manifest import MANIFEST, Manifest, read_manifest

IMPORT = "import.json"  # beside weights: where they came from
_OPTIMIZER = ("optimizer.", "chained_")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor of the model is: under a key of its own, or one layer of a stack."""

    key: str
    layer: int | None = None


class CheckpointReader:
    """The model's tensors in one complete checkpoint, by their name in the whole model.

    Raises CheckpointError where the folder is no complete checkpoint, or its model is not that of `run`.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint; name a folder like checkpoints/<phase>/step_00001500")
        self.manifest = read_manifest(folder)
        if self.manifest.kind == "weights":
            check_same(Shape(run.model, run.mup), read_model(folder), str(folder))
        elif self.manifest.digest != derive.run_digest(run):
            raise CheckpointError(
                f"{folder}: belongs to a run with another config; give the run.yaml it was trained with"
            )
        _check_sizes(folder, self.manifest)
        self._reader = distcp.Reader(folder)
        self._stored = dict(_model_tensors(self._reader))

    @property
    def manifest_digest(self) -> str:
        """What tells this checkpoint from any other."""
        return files.digest_file(self.folder / MANIFEST)

    def names(self) -> list[str]:
        """Such as `decoder.layers.3.mlp.linear_fc2.weight`, in no particular order."""
        return list(self._stored)

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        stored = self._stored[name]
        shape = torch.Size(self._reader.shape(stored.key))
        return shape if stored.layer is None else shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it was saved in."""
        return self._reader.dtype(self._stored[name].key)

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """One tensor, in the dtype it was saved in: a new one, or `into`, which has its shape and dtype.

        Raises CheckpointError where its bytes cannot be read.
        """
        stored = self._stored[name]
        target = torch.empty(self.shape(name), dtype=self.dtype(name)) if into is None else into
        start = (0,) * target.ndim
        if stored.layer is None:
            self.read_box(stored.key, start, target)
        else:
            self.read_box(stored.key, (stored.layer, *start), target[None])
        return target

    def read_box(self, key: str, offset: tuple[int, ...], target: Tensor) -> None:
        """Fills `target` with what begins at `offset` of the tensor that is stored as `key`."""
        self._reader.read([distcp.Request(key, offset, target)])


def run_of(checkpoint: Path, given: Path | None = None) -> Run:
    """The run that a checkpoint is of: a config that was named, that of its run folder, or what lies beside weights."""
    if given is not None:
        return load_run(given)
    if not is_import(checkpoint):
        return load_run((checkpoint / "../../../run.yaml").resolve())
    try:
        longest = int(files.read_json(checkpoint / IMPORT)["sequence_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / IMPORT}: damaged ({error!r}); convert the weights again") from error
    return as_run(read_model(checkpoint), longest, read_manifest(checkpoint).precision)


def is_import(checkpoint: Path) -> bool:
    """Whether a checkpoint is weights that were converted from elsewhere, without a run."""
    return (checkpoint / IMPORT).is_file()


def _model_tensors(reader: distcp.Reader) -> Iterator[tuple[str, _Stored]]:
    for key, stored in reader.tensors.items():
        if key.startswith(_OPTIMIZER):
            continue
        if is_stack(key):
            for layer in range(stored.size[0]):
                yield name_of(key, layer), _Stored(key, layer)
        else:
            yield key, _Stored(key)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != entry.bytes:
            raise CheckpointError(f"{folder / name}: missing or not of its {entry.bytes} bytes; use another checkpoint")
