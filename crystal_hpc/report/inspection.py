"""One checkpoint in words: what its manifest says, and on demand its tensors and the keys of its optimizer's state.

What `tools/inspect_checkpoint.py` prints. The manifest needs no torch; the keys stand in `.metadata`, which does.
"""

import time
from pathlib import Path
from typing import Any

from crystal_hpc.config.units import format_bytes, format_count, format_seconds
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.generations import read_kept, read_verified
from crystal_hpc.train.manifest import MANIFEST, Manifest, read_manifest

METADATA = ".metadata"  # as train.distcp names it; importing that would import torch


def inspect(folder: Path, optimizer: bool = False) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of a checkpoint, and beside it: `verified`, `kept`, and with `optimizer` `keys`: their shape, dtype
    and number of chunks. Raises CheckpointError, saying what the folder is, where it is no checkpoint."""
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder}: {_what_it_is(folder)}")
    manifest = read_manifest(folder)
    notes: dict[str, Any] = {"verified": read_verified(folder), "kept": read_kept(folder)}
    if optimizer:
        notes["keys"] = _optimizer_keys(folder)
    return manifest, notes


def _what_it_is(folder: Path) -> str:
    if not folder.is_dir():
        return "is a file, not a checkpoint" if folder.exists() else "no such folder"
    if (folder / "run.yaml").exists():
        return f"is a run folder; list its checkpoints with: crystal checkpoints {folder}"
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return "is a Hugging Face folder, not a checkpoint of a run; tools/compare_checkpoints.py reads those"
    if (folder / METADATA).exists():
        return f"is a distributed checkpoint without {MANIFEST}: not one of a run's, or its saving was cut short"
    return f"is no checkpoint: it has no {MANIFEST}; name a folder like RUN/checkpoints/<phase>/step_00001500"


def _optimizer_keys(folder: Path) -> dict[str, dict[str, Any]]:
    from crystal_hpc.train.distcp import Reader

    reader = Reader(folder)
    return {
        key: {
            "shape": list(reader.shape(key)),
            "dtype": str(reader.dtype(key)).removeprefix("torch."),
            "chunks": len(reader.tensors[key].chunks),
        }
        for key in sorted(reader.tensors)
        if key.startswith(("optimizer.", "chained_"))
    }


def describe(folder: Path, manifest: Manifest, notes: dict[str, Any], tensors: bool = False) -> str:
    """The summary, then with `tensors` a line for each, then the optimizer's keys if `notes` has them."""
    lines = [f"{folder}:", *(f"  {name:<12}{said}" for name, said in _summary(manifest, notes))]
    if tensors:
        lines.append(f"{len(manifest.tensors)} tensors:")
        lines += _columns([
            [name, _shape(one.shape), one.dtype, f"norm {one.norm:.6g}"] for name, one in manifest.tensors.items()
        ])  # fmt: skip
    if "keys" in notes:
        keys: dict[str, dict[str, Any]] = notes["keys"]
        lines.append(f"{len(keys)} keys of the optimizer's state:")
        lines += _columns([
            [key, _shape(one["shape"]), one["dtype"], f"{one['chunks']} chunks"] for key, one in keys.items()
        ])  # fmt: skip
    return "\n".join(lines)


def _summary(manifest: Manifest, notes: dict[str, Any]) -> list[tuple[str, str]]:
    numbers = sum(_count(tensor.shape) for tensor in manifest.tensors.values())
    optimizer = "none" if manifest.optimizer is None else f"Adam, {manifest.optimizer.get('steps', '?')} steps"
    verified, kept = notes["verified"], notes["kept"]
    layout = ", ".join(f"{key} {value}" for key, value in manifest.layout.items())
    return [
        ("run", f"{manifest.run} (digest {manifest.digest})"),
        ("position", f"phase {manifest.phase}, step {manifest.step:,}, {format_count(manifest.tokens)} tokens"),
        ("kind", f"{manifest.kind}, {manifest.precision}; optimizer: {optimizer}"),
        ("saved", f"{_moment(manifest.created)}, in {format_seconds(manifest.seconds)} ({manifest.why})"),
        ("layout", layout),
        ("model", f"{len(manifest.tensors)} tensors, {format_count(numbers)} parameters"),
        ("files", f"{len(manifest.files)}, {format_bytes(manifest.bytes)}"),
        ("verified", f"{_moment(verified['time'])} by {verified.get('by', '?')}" if verified else "no"),
        ("kept", f"as {kept['name']}" if kept else "by the rules alone"),
        ("code", manifest.commit or "unknown"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        *(
            (f"ledger {phase}", ", ".join(f"{source} {of['samples']:,} samples" for source, of in sources.items()))
            for phase, sources in manifest.ledger.items()
        ),
    ]


def _moment(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _shape(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(str(length) for length in shape) or "one number"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))] if rows else []
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
