"""A Hugging Face folder as a source of tensors: its config, and each tensor by its published name.

The weights may be one safetensors file, several with an index, or torch's own `pytorch_model*.bin`, as older releases
have them. Nothing in the folder is executed: pickles are read with `weights_only`, model code is not looked at. Of a
folder that `weights` exported, what is read is compared with the digests that the export recorded.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.convert.blocks import contiguous
from crystal_hpc.convert.safetensors_io import SafetensorsFile
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.archive import as_bytes

CONFIG = "config.json"
MARKER = "export.json"  # in a folder that `weights` wrote
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Found:
    """A tensor of the folder, not read yet."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class HfFolder:
    """The tensors in a folder, by published name. Raises CheckpointError for a folder that is not whole.

    `tensors`: name -> where, dtype, shape. `config`: what config.json says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_object(folder / CONFIG, "so it is no Hugging Face folder")
        names, index = _weight_files(folder)
        self._open = {name: _open(folder / name) for name in names}
        self.tensors = self._list()
        if index is not None:
            self._check_index(index)
        self._recorded = _recorded_digests(folder)

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """One tensor, contiguous, in the dtype it is stored in: a new one, or `into`, which is so already.

        Raises CheckpointError where its bytes cannot be read, or are not those that were exported.
        """
        return self.read_hashed(name, into)[0]

    def read_hashed(self, name: str, into: Tensor | None = None) -> tuple[Tensor, str]:
        """As `read`; and the xxh3-128 digest of the tensor's bytes, in hex."""
        tensor = contiguous(self._open[self.tensors[name].file].read(name, into=into))
        digest, expected = xxhash.xxh3_128_hexdigest(as_bytes(tensor)), self._recorded.get(name)
        if expected not in (None, digest):
            raise CheckpointError(
                f"{self.folder / self.tensors[name].file}: {name} is not what was exported (its digest differs from "
                f"that in {MARKER}); export it again"
            )
        return tensor, digest

    def read_ahead(self, name: str) -> None:
        """Asks the kernel to fetch a tensor, and returns at once."""
        file = self._open[self.tensors[name].file]
        if isinstance(file, SafetensorsFile):
            file.read_ahead(name)

    def close(self) -> None:
        """Nothing can be read any more."""
        for file in self._open.values():
            file.close()

    def identity(self) -> dict[str, list[int]]:
        """Size and time of change of each file: what tells the folder from another state of itself."""
        indices = [path.name for path in self.folder.glob(f"*{INDEX}")]
        about = {name: (self.folder / name).stat() for name in [CONFIG, *self._open, *sorted(indices)]}
        return {name: [status.st_size, status.st_mtime_ns] for name, status in about.items()}

    def _list(self) -> dict[str, Found]:
        found: dict[str, Found] = {}
        for name, file in self._open.items():
            for tensor, stored in file.tensors.items():
                if tensor in found:
                    raise CheckpointError(f"{self.folder}: {tensor} is both in {found[tensor].file} and in {name}")
                found[tensor] = Found(name, stored.dtype, tuple(stored.shape))
        return found

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise CheckpointError(f"{self.folder / file}: lacks {name}, which the index says is in it")
        if more := sorted(self.tensors.keys() - index.keys()):
            raise CheckpointError(f"{self.folder / self.tensors[more[0]].file}: holds {more[0]}, which the index lacks")


class _TorchFile:
    """A file of torch.save. Its tensors share the mapped file, so that only those that are read take memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # The zip format of torch can be mapped; the older one is read whole.
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            raise CheckpointError(f"{path}: cannot be read ({_first_line(error)}); fetch it again") from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path}: is not a table of tensors")
        self.tensors: dict[str, Tensor] = content

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        tensor = self.tensors[name].detach()
        return tensor if into is None else into.copy_(tensor)

    def close(self) -> None:
        self.tensors = {}


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder looks like one, complete or not."""
    return (folder / CONFIG).is_file()


def _open(path: Path) -> SafetensorsFile | _TorchFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


def _weight_files(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """The names of the files with weights, and which tensor is in which, where an index says so."""
    for single in (SAFETENSORS, TORCH):
        if (folder / single).is_file():  # first, as in Transformers: the index may be an older save's
            return [single], None
        if (folder / (single + INDEX)).is_file():
            index = _read_index(folder / (single + INDEX))
            names = sorted(set(index.values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise CheckpointError(f"{folder / missing[0]}{more}: missing; the index names it: fetch it")
            return names, index
    raise CheckpointError(f"{folder}: has neither {SAFETENSORS} nor {TORCH}, nor an index of either; fetch the weights")


def _read_index(path: Path) -> dict[str, str]:
    placed = read_object(path, "").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path}: has no weight_map; fetch it again")
    for name, file in placed.items():
        # A name that leads out of the folder is no file of it.
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{path}: puts {name} into {file!r}, which is no file of weights in this folder")
    return placed


def read_object(path: Path, so: str) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none, which is `so`."""
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no {path.name}{so and ', ' + so}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return content


def _recorded_digests(folder: Path) -> dict[str, str]:
    if not (folder / MARKER).is_file():
        return {}
    content = read_object(folder / MARKER, "")
    try:
        return {name: about["xxh3"] for name, about in content.get("published", {}).items()}
    except (AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / MARKER}: damaged ({error!r}); export it again") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def dump_index(folder: Path, placed: Mapping[str, str], nbytes: int) -> None:
    """Writes the index of a folder with several safetensors files: tensor -> file."""
    content = {"metadata": {"total_size": nbytes}, "weight_map": dict(placed)}
    files.write_file(folder / (SAFETENSORS + INDEX), json.dumps(content, indent=2) + "\n")
