"""A checkpoint's weights into a Hugging Face folder, tensor by tensor: the last step of a token's way.

`reader` finds the tensors in the checkpoint, the table in `names` says what becomes of each, and this module writes
them down with all that Transformers wants beside them. In memory are one layer's tensor and one output file at a time,
whatever the size of the model. Megatron is not needed.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import formats, names
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.data.catalog import TOKENIZER_FILE
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import CheckpointError

MARKER = "export.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CODE = Path(__file__).parent / "hf"
FORMAT = formats.by_name("crystalcoder")
SHARD_BYTES = 5 * 10**9

Dtype = Literal["float32", "bfloat16"]
Progress = Callable[[str, int, int], None]
"""What is being done, how many of it are done, of how many."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote."""

    folder: Path
    dtype: str
    tensors: int
    parameters: int
    weight_files: int
    weight_bytes: int


def trained_dtype(run: Run) -> Dtype:
    """The number format of the weights that the run computes with: an export in it is exact."""
    return "bfloat16" if run.precision == "bf16" else "float32"


def export(
    checkpoint: Path,
    run: Run,
    tokenizer: Path | None,
    out: Path,
    dtype: Dtype = "float32",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ExportSummary:
    """Writes a checkpoint as a folder that Transformers loads with `trust_remote_code=True`.

    Weights go into safetensors files of at most about `shard_bytes`. `tokenizer` is a tokenizer.json or its folder.
    The folder appears under its name when it is complete. Raises CheckpointError for a checkpoint that cannot be read
    or does not fit `run`, for a model that the format cannot express, for a tokenizer with more ids than the model,
    and when `out` exists, unless it is an export and `overwrite` is set; DiskError where the file system refuses.
    """
    shape = names.Shape(run.model, run.mup)
    FORMAT.check(shape)
    reader = CheckpointReader(checkpoint, run)
    entries = FORMAT.entries(shape)
    names.check_complete((entry.megatron for entry in entries), reader.names(), str(checkpoint))
    out = out.resolve()
    _check_destination(out, overwrite)
    vocabulary = _load_tokenizer(tokenizer, run)
    pending = out.with_name(out.name + files.PENDING)
    files.remove_folder(pending)
    files.make_folder(pending)
    try:
        summary = _write_weights(reader, run, entries, pending, dtype, shard_bytes, on_progress)
        with files.disk_errors(pending):
            _write_config(run, vocabulary, dtype, pending)
            _copy_tokenizer(tokenizer, vocabulary, pending)
            files.write_json(pending / MARKER, _describe(reader, run, summary))
        _commit(pending, out)
    except BaseException:
        files.remove_folder(pending)
        raise
    return ExportSummary(out, **summary)


def _check_destination(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not (out / MARKER).is_file():
        raise CheckpointError(f"{out}: exists and is no export; choose another folder")
    if not overwrite:
        raise CheckpointError(f"{out}: holds an export already; choose another folder, or overwrite it (--overwrite)")


def _load_tokenizer(path: Path | None, run: Run) -> Tokenizer | None:
    if path is None:
        return None
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise CheckpointError(
            f"{path}: has {tokenizer.vocab_size} ids, more than model.vocab_size = {run.model.vocab_size}; "
            "give the tokenizer that the run was trained with"
        )
    return tokenizer


def _write_weights(
    reader: CheckpointReader,
    run: Run,
    entries: list[names.Entry],
    folder: Path,
    dtype: Dtype,
    shard_bytes: int,
    on_progress: Progress | None,
) -> dict[str, Any]:
    """Writes the weight files and their index; returns the summary's numbers."""
    number_format: torch.dtype = getattr(torch, dtype)
    shape = names.Shape(run.model, run.mup)
    shards = _plan_shards(reader, shape, entries, number_format.itemsize, shard_bytes)
    placed: dict[str, str] = {}
    elements = done = 0
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for entry in shard:
            for published, part in names.split(entry, shape, reader.read(entry.megatron)):
                tensors[published] = part.to(number_format, memory_format=torch.contiguous_format, copy=True)
            done += 1
            if on_progress:
                on_progress("writing tensors", done, len(entries))
        _save_shard(tensors, folder / name)
        placed |= dict.fromkeys(tensors, name)
        elements += sum(tensor.numel() for tensor in tensors.values())
    total = elements * number_format.itemsize
    if len(shards) > 1:
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed}
        )
    return {
        "dtype": dtype,
        "tensors": len(placed),
        "parameters": elements,
        "weight_files": len(shards),
        "weight_bytes": total,
    }


def _plan_shards(
    reader: CheckpointReader, shape: names.Shape, entries: list[names.Entry], itemsize: int, shard_bytes: int
) -> list[list[names.Entry]]:
    """Entries in order, cut where the next one would make a file too large."""
    shards: list[list[names.Entry]] = [[]]
    size = 0
    for entry in entries:
        more = sum(map(math.prod, names.published_sizes(entry, shape))) * itemsize
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += more
    return shards


def _save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    with files.disk_errors(path):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors keeps its files to their owner; a shared export is for the team
        except SafetensorError as error:
            raise OSError(str(error)) from error  # it hides the errno of a full disk in its text


def _write_config(run: Run, tokenizer: Tokenizer | None, dtype: Dtype, folder: Path) -> None:
    """config.json, generation_config.json, and the code they point to."""
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos} if tokenizer else {}
    configuration, modeling = (name.removesuffix(".py") for name in FORMAT.code_files)
    config = {
        "architectures": [FORMAT.architecture],
        "auto_map": {
            "AutoConfig": f"{configuration}.CrystalCoderConfig",
            "AutoModel": f"{modeling}.CrystalCoderModel",
            "AutoModelForCausalLM": f"{modeling}.CrystalCoderForCausalLM",
        },
        **FORMAT.published_config(run),
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        **ends,
    }
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "generation_config.json", {**ends, "pad_token_id": tokenizer.eos} if tokenizer else {})
    for name in FORMAT.code_files:
        shutil.copyfile(MODEL_CODE / name, folder / name)


def _copy_tokenizer(path: Path | None, tokenizer: Tokenizer | None, folder: Path) -> None:
    if path is None or tokenizer is None:
        return
    source = path if path.is_dir() else path.parent
    shutil.copyfile(path / TOKENIZER_FILE if path.is_dir() else path, folder / TOKENIZER_FILE)
    if (source / TOKENIZER_CONFIG).is_file():
        shutil.copyfile(source / TOKENIZER_CONFIG, folder / TOKENIZER_CONFIG)
        return
    ends = {"bos_token": tokenizer.decode([tokenizer.bos]), "eos_token": tokenizer.decode([tokenizer.eos])}
    files.write_json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", **ends})


def _describe(reader: CheckpointReader, run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The marker: what the export was made from."""
    origin = {key: reader.manifest.get(key) for key in ("phase", "step", "tokens", "digest")}
    return {"format": FORMAT.title, "run": run.name, **origin, **summary}


def _commit(pending: Path, out: Path) -> None:
    if not out.exists():
        files.commit_folder(pending, out)
        return
    old = out.with_name(f"{out.name}.old{files.PENDING}")
    files.remove_folder(old)
    with files.disk_errors(out):
        out.rename(old)
    files.commit_folder(pending, out)
    files.remove_folder(old)
