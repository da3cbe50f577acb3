"""Reads a conversion back from the disk and takes it back to where it came from: every tensor, by digest and norm.

What was written is turned by the same table the other way. Where nothing was rounded, the digest of what comes out must
be that of what went in; where a tensor was rounded on the way, its norm must be the same within rounding.
"""

import math
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import names
from crystal_hpc.convert.blocks import Norm
from crystal_hpc.convert.from_hf import Source, read_import
from crystal_hpc.convert.hf_folder import MARKER, HfFolder
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.convert.weights import Meter, Progress
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.archive import as_bytes

# Half a unit in the last place, relative, for each number; what a norm is summed up from errs by less.
ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-11, torch.float32: 1e-5}


def check_export(folder: Path, run: Run, target: names.Format, on_progress: Progress | None = None) -> int:
    """Compares an export with what was read from the checkpoint; returns the number of Megatron tensors.

    Raises CheckpointError that names the first file or tensor that is not what it should be.
    """
    shape = names.Shape(run.model, run.mup)
    entries = target.entries(shape)
    marker = files.read_json(folder / MARKER)
    hf = HfFolder(folder)  # compares each tensor that is read with the digest that was taken as it was written
    try:
        names.check_complete((name for entry in entries for name in entry.published), hf.tensors, str(folder))
        _check_files(folder, marker["files"])
        meter = Meter("reading back", sum(tensor.nbytes for tensor in hf.tensors.values()), on_progress)
        for entry in entries:
            parts = [hf.read(name) for name in entry.published]
            tensor = names.join(entry, shape, parts)
            _compare(f"{folder}: {entry.megatron}", tensor, marker["sources"][entry.megatron], parts[0].dtype)
            meter.add(sum(part.nbytes for part in parts))
    finally:
        hf.close()
    return len(entries)


def check_import(folder: Path, source: Source, on_progress: Progress | None = None) -> int:
    """Compares imported weights with the folder they came from; returns the number of published tensors.

    Raises CheckpointError that names the first file or tensor that is not what it should be.
    """
    entries = source.format.entries(source.shape)
    reader = CheckpointReader(folder, source.run())
    names.check_complete((entry.megatron for entry in entries), reader.names(), str(folder))
    _check_files(folder, {name: {"xxh3": entry.xxh3} for name, entry in reader.manifest.files.items()})
    digests = read_import(folder)["sources"]
    total = sum(source.folder.tensors[name].nbytes for entry in entries for name in entry.published)
    meter = Meter("reading back", total, on_progress)
    for entry in entries:
        tensor = reader.read(entry.megatron)
        about = reader.manifest.tensors[entry.megatron]
        _check_norm(f"{folder}: {entry.megatron}", Norm().add(tensor).value, about.norm, 1e-5)
        for name, part in zip(entry.published, names.split(entry, source.shape, tensor), strict=True):
            stored = source.folder.tensors[name]
            if stored.dtype == part.dtype and _digest(part) != digests[name]:
                raise CheckpointError(f"{folder}: {name} does not come back from {entry.megatron}; convert it again")
            if stored.dtype != part.dtype:
                norm = Norm().add(source.folder.read(name)).value
                _check_norm(f"{folder}: {name}", Norm().add(part).value, norm, _allowed(part.dtype))
            meter.add(stored.nbytes)
    return len(digests)


def _check_files(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    for name, about in entries.items():
        if files.digest_file(folder / name) != about["xxh3"]:
            raise CheckpointError(f"{folder / name}: is not what was written, by its digest; is the disk failing?")


def _compare(what: str, tensor: Tensor, source: dict[str, Any], dtype: torch.dtype) -> None:
    if str(dtype) == f"torch.{source['dtype']}":
        if _digest(tensor) != source["xxh3"]:
            raise CheckpointError(f"{what} does not come back from what was written; convert it again")
        return
    _check_norm(what, Norm().add(tensor).value, source["norm"], _allowed(dtype))


def _check_norm(what: str, found: float, expected: float, allowed: float) -> None:
    if not math.isclose(found, expected, rel_tol=allowed, abs_tol=1e-12):  # so that NaN fails too
        raise CheckpointError(
            f"{what} has a norm of {found:.6g}, and came from one of {expected:.6g}; convert it again"
        )


def _allowed(dtype: torch.dtype) -> float:
    return ROUNDING.get(dtype, 0.0) + ROUNDING[torch.float32]


def _digest(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(as_bytes(tensor))
