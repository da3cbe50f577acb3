"""Weights from a Hugging Face folder into a checkpoint that a run can begin with: `weights`, the other way round.

The folder that is written is a generation of kind `weights`: Megatron's torch_dist files, the layers stacked as
Megatron stacks them, no optimizer, and beside them `model.yaml`, the config's sections that fit. Tensor by tensor,
resumable, and in place under its name only when complete, as an export.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from crystal_hpc import files, provenance
from crystal_hpc.config import derive
from crystal_hpc.config.compute import Parallel
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import formats, names
from crystal_hpc.convert.blocks import Arena, Arenas, Background, Norm, one_thread
from crystal_hpc.convert.hf_folder import HfFolder
from crystal_hpc.convert.reader import IMPORT
from crystal_hpc.convert.resume import Work, working
from crystal_hpc.convert.shapes import as_run, check_same, write_model
from crystal_hpc.convert.weights import SHARD_BYTES, Dtype, Meter, Progress, cut
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train import distcp
from crystal_hpc.train.archive import as_bytes
from crystal_hpc.train.keys import key_of
from crystal_hpc.train.manifest import FileEntry, Manifest, TensorEntry

PHASE = "converted"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote."""

    folder: Path
    format: str
    dtype: str
    tensors: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that has been understood: its format, its model and its longest sequence."""

    folder: HfFolder
    format: names.Format
    shape: names.Shape
    longest: int

    def run(self, precision: str = "fp32") -> Run:
        """A run of this model, for what wants one."""
        return as_run(self.shape, self.longest, precision)


@contextlib.contextmanager
def opened(folder: Path, run: Run | None = None) -> Iterator[Source]:
    """A folder to import from.

    Raises CheckpointError for one that is damaged, of no known format, whose tensors are not those of its config, or
    that does not fit `run`, whose model then counts.
    """
    hf = HfFolder(folder)
    try:
        try:
            target = formats.of_config(hf.config)
            shape, longest = target.read_config(hf.config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        if run is not None:
            wanted = names.Shape(run.model, run.mup)
            check_same(wanted, shape, str(folder))
            shape = wanted
        target.check(shape)
        copies = target.copies(shape)
        expected = [name for entry in target.entries(shape) for name in entry.published]
        found = [name for name in hf.tensors if name not in copies and not target.is_buffer(name)]
        names.check_complete(expected, found, str(folder))
        yield Source(hf, target, shape, longest)
    finally:
        hf.close()


def convert(
    source: Source,
    out: Path,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> ImportSummary:
    """Writes the weights of a Hugging Face folder as a checkpoint, in `dtype` or as they are stored.

    `check` and `overwrite` as in `weights.export`. Raises CheckpointError for tensors that are not the model's, of a
    kind that is no weight, or of several kinds where one is needed; DiskError where the file system refuses.
    """
    started = time.time()
    stream = _Stream(source, dtype, shard_bytes, on_progress)
    identity = {
        "format": source.format.name,
        "files": source.folder.identity(),
        "dtype": dtype,
        "shard_bytes": shard_bytes,
        "model": repr(source.shape),
    }
    with working(out.resolve(), identity, IMPORT, overwrite) as work:
        stream.write(work)
        if source.folder.identity() != identity["files"]:
            raise CheckpointError(f"{source.folder.folder}: was changed while it was read; convert it again")
        manifest = _manifest(source, stream.precision, work, started)
        summary = _finish(source, work, manifest, out)
        if check:
            check(work.folder)
    return summary


class _Stream:
    """The files of one import, written one after the other."""

    def __init__(self, source: Source, dtype: Dtype | None, shard_bytes: int, on_progress: Progress | None) -> None:
        self._source, self._hf, self._shape = source, source.folder, source.shape
        self._entries = source.format.entries(source.shape)
        self._originals = {original: copy for copy, original in source.format.copies(source.shape).items()}
        self._dtypes = _dtypes(source, self._entries, None if dtype is None else getattr(torch, dtype))
        self._shards = cut(self._entries, self._nbytes, shard_bytes)
        self._meter = Meter("writing weights", sum(map(self._nbytes, self._entries)), on_progress)
        self._parts = Arena()
        self._targets = Arenas()

    @property
    def precision(self) -> str:
        """As a run's config has it."""
        return "bf16" if set(self._dtypes.values()) == {torch.bfloat16} else "fp32"

    def write(self, work: Work) -> None:
        """Writes what is not finished yet."""
        with one_thread():
            for index, shard in enumerate(self._shards):
                name = f"__0_{index}.distcp"
                if name in work.finished:
                    self._meter.skip(sum(map(self._nbytes, shard)))
                else:
                    self._write_file(name, shard, work)

    def _write_file(self, name: str, shard: list[names.Entry], work: Work) -> None:
        path = work.folder / name
        tensors: dict[str, Any] = {}
        sources: dict[str, str] = {}
        with files.disk_errors(path), Background() as background:
            writer = distcp.FileWriter(path)
            try:
                for entry, after in zip(shard, [*shard[1:], None], strict=True):
                    arena = self._targets.next(self._nbytes(entry))
                    tensor = self._read(entry, after, arena, sources)
                    arena.keep_for(background.submit(self._put, writer, entry.megatron, tensor, tensors))
                    self._meter.add(self._nbytes(entry))
                background.wait()
                written = writer.close()
            except BaseException:
                background.abandon()
                writer.abandon()
                raise
        placed = [{**one._asdict(), "dtype": _name(one.dtype)} for one in written.placed]
        work.note(name, written.bytes, written.digest, placed=placed, tensors=tensors, sources=sources)

    def _put(self, writer: distcp.FileWriter, name: str, tensor: Tensor, tensors: dict[str, Any]) -> None:
        """What is done in the background while the next tensor is read."""
        tensors[name] = about = _described(tensor)
        if not math.isfinite(about["norm"]):
            raise CheckpointError(f"{self._hf.folder}: {name} would hold numbers that are infinite or none at all")
        writer.add(self._chunk(name, tensor))

    def _read(self, entry: names.Entry, after: names.Entry | None, arena: Arena, sources: dict[str, str]) -> Tensor:
        """The Megatron tensor of an entry, in `arena`; the digests of what it is made of go into `sources`."""
        stored = [self._hf.tensors[name] for name in entry.published]
        parts = self._parts.tensors([(one.shape, one.dtype) for one in stored])
        for name, part in zip(entry.published, parts, strict=True):
            _, sources[name] = self._hf.read_hashed(name, part)
            self._check_copy(name, sources[name])
        for name in after.published if after else ():
            self._hf.read_ahead(name)
        size = names.size(self._shape.model, entry.megatron)
        (tensor,) = arena.tensors([(size, self._dtypes[entry.megatron])])
        return names.join(entry, self._shape, parts, tensor)

    def _check_copy(self, name: str, digest: str) -> None:
        copy = self._originals.get(name)
        if copy is None or copy not in self._hf.tensors:
            return
        if self._hf.read_hashed(copy)[1] != digest:
            raise CheckpointError(f"{copy}: differs from {name}, but a tied model has one of them")

    def _chunk(self, megatron: str, tensor: Tensor) -> distcp.Chunk:
        key, layer = key_of(megatron)
        if layer is None:
            return distcp.Chunk(key, tuple(tensor.shape), (0,) * tensor.ndim, tensor)
        return distcp.Chunk(key, (self._shape.model.layers, *tensor.shape), (layer, *(0,) * tensor.ndim), tensor[None])

    def _nbytes(self, entry: names.Entry) -> int:
        return math.prod(names.size(self._shape.model, entry.megatron)) * self._dtypes[entry.megatron].itemsize


def _dtypes(source: Source, entries: list[names.Entry], wanted: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype of each Megatron tensor; all layers of a stack have one."""
    found: dict[str, torch.dtype] = {}
    by_key: dict[str, tuple[str, torch.dtype]] = {}
    for entry in entries:
        for name in entry.published:
            dtype = source.folder.tensors[name].dtype
            if not dtype.is_floating_point or (wanted is None and dtype not in FLOATS):
                raise CheckpointError(f"{name}: is of {_name(dtype)}, which is no number format of weights")
            key = key_of(entry.megatron)[0]
            first, known = by_key.setdefault(key, (name, dtype))
            if wanted is None and known != dtype:
                raise CheckpointError(
                    f"{name}: is of {_name(dtype)}, and {first} of {_name(known)}; choose one for all with --dtype"
                )
            found[entry.megatron] = wanted or dtype
    return found


def _described(tensor: Tensor) -> dict[str, Any]:
    norm = Norm().add(tensor).value
    digest = xxhash.xxh3_128_hexdigest(as_bytes(tensor))
    return {"shape": list(tensor.shape), "dtype": _name(tensor.dtype), "norm": norm, "xxh3": digest}


def _manifest(source: Source, precision: str, work: Work, started: float) -> Manifest:
    tensors = {name: about for _, note in sorted(work.finished.items()) for name, about in note["tensors"].items()}
    alone = {"ranks": 1, **Parallel().model_dump()}
    return Manifest(
        kind="weights", run=source.folder.folder.resolve().name, digest=derive.run_digest(source.run(precision)),
        phase=PHASE, step=0, tokens=0, why="converted", layout=alone, precision=precision, ledger={}, optimizer=None,
        files={},
        tensors={
            name: TensorEntry(tuple(about["shape"]), about["dtype"], about["norm"]) for name, about in tensors.items()
        },
        commit=provenance.commit(), versions=provenance.versions(),
        created=time.time(), seconds=time.time() - started,
    )  # fmt: skip


def _finish(source: Source, work: Work, manifest: Manifest, out: Path) -> ImportSummary:
    """Writes all beside the tensors, the manifest last."""
    notes = [work.finished[name] for name in sorted(work.finished)]
    origin = source.folder.folder.resolve().name
    distcp.write_index(work.folder, (_placed(one) for note in notes for one in note["placed"]))
    write_model(work.folder, source.shape, source.longest, origin)
    about = {
        "source": origin,
        "format": source.format.name,
        "sequence_length": source.longest,
        "sources": {name: digest for note in notes for name, digest in note["sources"].items()},
        "tensors": {name: about["xxh3"] for note in notes for name, about in note["tensors"].items()},
    }
    files.write_json(work.folder / IMPORT, about)
    entries = {note["file"]: FileEntry(note["bytes"], note["xxh3"]) for note in notes}
    for name in (*distcp.INDEX_FILES, "model.yaml", IMPORT):
        path = work.folder / name
        files.fsync_path(path)
        entries[name] = FileEntry(path.stat().st_size, files.digest_file(path))
    dataclasses.replace(manifest, files=entries).write(work.folder)
    dtypes = sorted({tensor.dtype for tensor in manifest.tensors.values()})
    elements = {name: math.prod(tensor.shape) for name, tensor in manifest.tensors.items()}
    nbytes = sum(count * getattr(torch, manifest.tensors[name].dtype).itemsize for name, count in elements.items())
    return ImportSummary(
        out.resolve(), source.format.name, " and ".join(dtypes), len(elements), sum(elements.values()), nbytes
    )


def _placed(note: dict[str, Any]) -> distcp.Placed:
    boxes = {field: tuple(note[field]) for field in ("shape", "offset", "size")}
    return distcp.Placed(**{**note, **boxes, "dtype": getattr(torch, note["dtype"])})


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def read_import(folder: Path) -> dict[str, Any]:
    """What an import says of itself. Raises CheckpointError where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads((folder / IMPORT).read_bytes())
        return {"sources": dict(content["sources"]), "tensors": dict(content["tensors"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / IMPORT}: damaged ({error!r}); convert the weights again") from error
