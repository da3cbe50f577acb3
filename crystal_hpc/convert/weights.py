"""A checkpoint's weights into a Hugging Face folder, tensor by tensor: the last step of a token's way.

`reader` finds the tensors in the checkpoint, a format's table says what becomes of each, `safetensors_io` writes them,
and this module puts all beside them that Transformers wants. In memory are about two of the largest tensors, whatever
the size of the model and of the files. What was written stays when the process is killed (`resume`). Megatron is not
needed. `from_hf` is the way back.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import formats, names
from crystal_hpc.convert.blocks import Arena, Arenas, Background, Norm, one_thread
from crystal_hpc.convert.digests import DigestCheck
from crystal_hpc.convert.hf_folder import CONFIG, MARKER, SAFETENSORS, dump_index, read_object
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.convert.resume import PROGRESS, Work, working
from crystal_hpc.convert.safetensors_io import SafetensorsWriter
from crystal_hpc.data.catalog import TOKENIZER_FILE
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.archive import as_bytes

TOKENIZER_CONFIG = "tokenizer_config.json"
BESIDE_TOKENIZER = ("special_tokens_map.json", "chat_template.jinja")
MODEL_CODE = Path(__file__).parent / "hf"
FORMAT = formats.by_name("crystalcoder")
SHARD_BYTES = 5 * 10**9

# No float16: weights beyond 65504 or below 6e-8 would not survive, and training never saw them rounded so.
Dtype = Literal["float32", "bfloat16"]
Verify = Literal["all", "weights", "none"]
Progress = Callable[[str, int, int, str], None]
"""What is being done, how many bytes of it are done, of how many, and a word on it."""


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
    target: names.Format = FORMAT,
    verify: Verify = "weights",
    check: Callable[[Path], None] | None = None,
) -> ExportSummary:
    """Writes a checkpoint as a folder that Transformers loads, with `trust_remote_code=True` if it has code of its own.

    Weights go into safetensors files of at most about `shard_bytes`. `tokenizer` is a tokenizer.json or its folder.
    The checkpoint's files are compared with their digests on the way unless `verify` is `none`. The folder appears
    under its name when it is complete and `check`, which is given the folder under its temporary name, has raised
    nothing; then the marker says `verify` of it. Files that a killed process finished are kept (`resume`). Raises
    CheckpointError for a checkpoint that cannot be read or does not fit `run`, for a model that the format cannot
    express, for a tokenizer with more ids than the model, and when `out` exists, unless it is an export and `overwrite`
    is set; DiskError where the file system refuses.
    """
    shape = names.Shape(run.model, run.mup)
    target.check(shape)
    reader = CheckpointReader(checkpoint, run)
    entries = target.entries(shape)
    names.check_complete((entry.megatron for entry in entries), reader.names(), str(checkpoint))
    vocabulary = _load_tokenizer(tokenizer, run)
    identity = conversion(reader, tokenizer, target, dtype, shard_bytes)
    with working(out.resolve(), identity, MARKER, overwrite) as work:
        stream = _Stream(reader, shape, entries, getattr(torch, dtype), shard_bytes, on_progress)
        with _checked(reader, verify != "none") as checker, one_thread():
            summary = stream.write(work, checker)
        _write_config(run, vocabulary, dtype, target, work.folder)
        _copy_tokenizer(tokenizer, vocabulary, work.folder)
        about = _describe(reader, run, identity, summary, work)
        files.write_json(work.folder / MARKER, about)
        if check:
            check(work.folder)
            files.write_json(work.folder / MARKER, about | {"verified": verify})
    return ExportSummary(out.resolve(), **summary)


def conversion(
    reader: CheckpointReader, tokenizer: Path | None, target: names.Format, dtype: str, shard_bytes: int
) -> dict[str, Any]:
    """What makes an export the same as another: checkpoint and tokenizer, and what is asked for."""
    return {
        "format": target.name,
        "manifest": reader.manifest_digest,
        "tokenizer": None if tokenizer is None else files.digest_file(_tokenizer_file(tokenizer)),
        "dtype": dtype,
        "shard_bytes": shard_bytes,
    }


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


@contextlib.contextmanager
def _checked(reader: CheckpointReader, check: bool) -> Iterator[DigestCheck | None]:
    if not check:
        yield None
        return
    checker = DigestCheck(reader.folder, reader.manifest.files)
    try:
        yield checker
        checker.finish()
    finally:
        checker.stop()


class _Stream:
    """The weight files of one export, written one after the other."""

    def __init__(
        self,
        reader: CheckpointReader,
        shape: names.Shape,
        entries: list[names.Entry],
        dtype: torch.dtype,
        shard_bytes: int,
        on_progress: Progress | None,
    ) -> None:
        self._reader, self._shape, self._dtype = reader, shape, dtype
        self._sizes = {
            name: sizes
            for entry in entries
            for name, sizes in zip(entry.published, names.published_sizes(entry, shape), strict=True)
        }
        self._shards = self._plan(entries, shard_bytes)
        self._total = sum(map(self._nbytes, entries))
        self._meter = Meter("writing weights", self._total, on_progress)
        self._source = Arena()
        self._targets = Arenas()

    def write(self, work: Work, checker: DigestCheck | None) -> dict[str, Any]:
        """Writes what is not finished yet, and the index; returns the summary's numbers."""
        placed: dict[str, str] = {}
        for index, shard in enumerate(self._shards):
            whole = len(self._shards) == 1
            name = SAFETENSORS if whole else f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            if name in work.finished:
                self._meter.skip(sum(map(self._nbytes, shard)))
            else:
                self._write_file(name, shard, work, checker)
            placed |= {published: name for entry in shard for published in entry.published}
        if len(self._shards) > 1:
            dump_index(work.folder, placed, self._total)
        return {
            "dtype": str(self._dtype).removeprefix("torch."),
            "tensors": len(placed),
            "parameters": self._total // self._dtype.itemsize,
            "weight_files": len(self._shards),
            "weight_bytes": self._total,
        }

    def _write_file(self, name: str, shard: list[names.Entry], work: Work, checker: DigestCheck | None) -> None:
        layout = {part: (self._dtype, self._sizes[part]) for entry in shard for part in entry.published}
        sources: dict[str, Any] = {}
        path = work.folder / name
        with files.disk_errors(path), SafetensorsWriter(path, layout) as writer, Background() as notes:
            for entry in shard:
                tensor = self._read(entry.megatron)
                notes.submit(self._note, entry.megatron, tensor, sources)
                arena = self._targets.next(self._nbytes(entry))
                parts = arena.tensors([(self._sizes[part], self._dtype) for part in entry.published])
                names.split(entry, self._shape, tensor, parts)
                for published, part in zip(entry.published, parts, strict=True):
                    arena.keep_for(writer.write(published, part))
                notes.wait()  # the next tensor takes the place of this one
                self._meter.add(self._nbytes(entry))
                if checker:
                    checker.advance(self._meter.share)
            written = writer.close()
        work.note(name, written.bytes, written.digest, published=written.tensors, sources=sources)

    def _read(self, megatron: str) -> Tensor:
        """A tensor without the rows of a padded vocabulary, which differ from one layout to the next."""
        (tensor,) = self._source.tensors([(self._reader.shape(megatron), self._reader.dtype(megatron))])
        self._reader.read(megatron, tensor)
        return tensor[: self._shape.model.vocab_size] if megatron in names.VOCABULARY else tensor

    def _note(self, megatron: str, tensor: Tensor, sources: dict[str, Any]) -> None:
        """Takes down what came in. Raises CheckpointError where it is not what was saved, by its norm."""
        norm = Norm().add(tensor).value
        saved = self._reader.manifest.tensors.get(megatron)
        same = saved is not None and saved.shape == tuple(tensor.shape)  # else the vocabulary was padded
        if saved and same and not math.isclose(norm, saved.norm, rel_tol=1e-4, abs_tol=1e-12):
            raise CheckpointError(
                f"{self._reader.folder}: {megatron} has a norm of {norm:.6g}, and the manifest says {saved.norm:.6g}; "
                "use another checkpoint"
            )
        digest = xxhash.xxh3_128_hexdigest(as_bytes(tensor))
        sources[megatron] = {"dtype": str(tensor.dtype).removeprefix("torch."), "norm": norm, "xxh3": digest}

    def _nbytes(self, entry: names.Entry) -> int:
        return sum(math.prod(self._sizes[name]) for name in entry.published) * self._dtype.itemsize

    def _plan(self, entries: list[names.Entry], shard_bytes: int) -> list[list[names.Entry]]:
        return cut(entries, self._nbytes, shard_bytes)


def cut(entries: list[names.Entry], nbytes: Callable[[names.Entry], int], most: int) -> list[list[names.Entry]]:
    """Entries in order, cut where the next one would make a file too large."""
    shards: list[list[names.Entry]] = [[]]
    size = 0
    for entry in entries:
        more = nbytes(entry)
        if shards[-1] and size + more > most:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += more
    return shards


class Meter:
    """Bytes done of all, and how fast; files of an earlier process count as done, and not as fast."""

    def __init__(self, what: str, total: int, on_progress: Progress | None) -> None:
        self._what, self._total, self._report = what, max(total, 1), on_progress
        self._done = self._skipped = 0
        self._started = time.monotonic()

    @property
    def share(self) -> float:
        """Of all, between 0 and 1."""
        return self._done / self._total

    def skip(self, nbytes: int) -> None:
        """Takes in what was there already."""
        self._skipped += nbytes
        self.add(nbytes)

    def add(self, nbytes: int) -> None:
        """Takes in what was done, and tells."""
        self._done += nbytes
        if self._report:
            rate = (self._done - self._skipped) / max(time.monotonic() - self._started, 1e-3)
            note = f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s"
            self._report(self._what, self._done, self._total, note)


def _write_config(run: Run, tokenizer: Tokenizer | None, dtype: Dtype, target: names.Format, folder: Path) -> None:
    """config.json, generation_config.json, and the code they point to."""
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos} if tokenizer else {}
    config: dict[str, Any] = {"architectures": [target.architecture]}
    if target.code_files:
        configuration, modeling = (name.removesuffix(".py") for name in target.code_files)
        config["auto_map"] = {
            "AutoConfig": f"{configuration}.CrystalCoderConfig",
            "AutoModel": f"{modeling}.CrystalCoderModel",
            "AutoModelForCausalLM": f"{modeling}.CrystalCoderForCausalLM",
        }
    config |= {
        **target.published_config(run),
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        **ends,
    }
    files.write_json(folder / CONFIG, config)
    files.write_json(folder / "generation_config.json", {**ends, "pad_token_id": tokenizer.eos} if tokenizer else {})
    for name in target.code_files:
        shutil.copyfile(MODEL_CODE / name, folder / name)


def _copy_tokenizer(path: Path | None, tokenizer: Tokenizer | None, folder: Path) -> None:
    if path is None or tokenizer is None:
        return
    source = _tokenizer_file(path)
    shutil.copyfile(source, folder / TOKENIZER_FILE)
    for name in BESIDE_TOKENIZER:
        if source.with_name(name).is_file():
            shutil.copyfile(source.with_name(name), folder / name)
    config = {"bos_token": tokenizer.decode([tokenizer.bos]), "eos_token": tokenizer.decode([tokenizer.eos])}
    if source.with_name(TOKENIZER_CONFIG).is_file():
        config = read_object(source.with_name(TOKENIZER_CONFIG), "")
        if "auto_map" not in config:
            shutil.copyfile(source.with_name(TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG)
            return
        del config["auto_map"]  # leads to code that is not here, and tokenizer.json says all that it does
    files.write_json(folder / TOKENIZER_CONFIG, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _tokenizer_file(path: Path) -> Path:
    return path / TOKENIZER_FILE if path.is_dir() else path


def _describe(
    reader: CheckpointReader, run: Run, identity: dict[str, Any], summary: dict[str, Any], work: Work
) -> dict[str, Any]:
    """The marker: what the export was made from, and every tensor and file by digest, coming in and going out."""
    manifest, done = reader.manifest, [(name, work.finished[name]) for name in sorted(work.finished)]
    beside = sorted({path.name for path in work.folder.iterdir()} - {PROGRESS, MARKER, *work.finished})
    return {
        "run": run.name,
        "phase": manifest.phase,
        "step": manifest.step,
        "tokens_trained": manifest.tokens,
        "digest": manifest.digest,
        **identity,
        **summary,
        "verified": "none",
        "files": {name: {"bytes": note["bytes"], "xxh3": note["xxh3"]} for name, note in done},
        "beside": {name: files.digest_file(work.folder / name) for name in beside},
        "published": {
            tensor: {"file": name, "xxh3": digest}
            for name, note in done
            for tensor, digest in note["published"].items()
        },
        "sources": {tensor: about for _, note in done for tensor, about in note["sources"].items()},
    }
