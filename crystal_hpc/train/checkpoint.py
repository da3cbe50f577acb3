"""Generations of a run's state: where they are, when they count, and which one a new attempt starts from.

`checkpoints/<phase>/step_00001500/` holds Megatron's files and, written last, `manifest.json`: the position, what run
it belongs to, and every file's size and digest. Saving goes to `step_00001500.pending` first; one rename makes it a
generation. A folder without a manifest, or under a pending name, was cut short and is never read.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train import torch_dist
from crystal_hpc.train.state import Position
from crystal_hpc.train.step import Trainer

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Generation:
    """One complete checkpoint on disk."""

    folder: Path
    position: Position
    manifest: dict[str, Any]


def generation_folder(run_folder: Path, run: Run, position: Position) -> Path:
    """Where the state after `position.step` steps of its phase belongs."""
    return run_folder / "checkpoints" / run.phases[position.phase].name / f"step_{position.step:08d}"


def save(trainer: Trainer, run_folder: Path, position: Position, why: str) -> Path:
    """Writes a generation and commits it; every rank returns once it is durable. A collective call.

    `why` says what caused it (`periodic`, `phase end`, `preempted`, `time limit`).
    Saving a position twice keeps the first. Raises DiskError where the file system refuses.
    """
    run, comm = trainer.run, trainer.layout.comm
    final = generation_folder(run_folder, run, position)
    if comm.broadcast((final / MANIFEST).exists()):
        return final
    started = time.time()
    pending = final.with_name(final.name + files.PENDING)
    if comm.rank == 0:
        files.remove_folder(pending)
        files.make_folder(pending)
    comm.barrier()
    try:
        with files.disk_errors(pending):
            torch_dist.save(trainer, pending)
    except Exception:
        if comm.rank == 0:
            files.remove_folder(pending)  # a full disk has no room for it, and the journal needs some
        raise
    if comm.rank == 0:
        manifest = {
            "format": 1,
            "run": run.name,
            "digest": derive.run_digest(run),
            **position.named(run),
            "tokens": position.tokens(run),
            "why": why,
            "layout": {"ranks": comm.size, **run.parallel.model_dump()},
            "precision": run.precision,
            "files": _describe_files(pending),
            "created": time.time(),
            "seconds": time.time() - started,
        }
        files.write_json(pending / MANIFEST, manifest)
        files.commit_folder(pending, final)
    comm.barrier()
    return final


def load_latest(trainer: Trainer, run_folder: Path) -> Position:
    """Loads the newest generation, or stays at the start of a run that has none. A collective call.

    What saves that were cut short have left behind is deleted.
    """
    comm = trainer.layout.comm
    if comm.rank == 0:
        for stale in (run_folder / "checkpoints").glob(f"*/step_*{files.PENDING}"):
            files.remove_folder(stale)
    found = comm.broadcast(latest(run_folder, trainer.run) if comm.rank == 0 else None)
    if found is None:
        return Position(0, 0)
    torch_dist.load(trainer, found.folder)
    return found.position  # type: ignore[no-any-return]


def load_model(trainer: Trainer, run_folder: Path, position: Position) -> None:
    """Loads the weights, and nothing else, of the generation at a position. A collective call.

    Raises CheckpointError if there is none.
    """
    folder = generation_folder(run_folder, trainer.run, position)
    if not trainer.layout.comm.broadcast((folder / MANIFEST).exists()):
        raise CheckpointError(f"{folder}: no complete checkpoint there")
    torch_dist.load_model(trainer, folder)


def latest(run_folder: Path, run: Run) -> Generation | None:
    """The generation furthest along, checked for belonging to this run and for missing or shortened files."""
    found = generations(run_folder, run)
    if not found:
        return None
    newest = max(found, key=lambda generation: generation.position)
    _check(newest, run)
    return newest


def generations(run_folder: Path, run: Run) -> list[Generation]:
    """Every complete checkpoint of the run, in order of position."""
    found = []
    for manifest_path in (run_folder / "checkpoints").glob(f"*/step_*/{MANIFEST}"):
        if manifest_path.parent.name.endswith(files.PENDING):
            continue
        try:
            manifest = files.read_json(manifest_path)
            position = Position.from_named(run, manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{manifest_path}: damaged ({error}); move its folder away to go on from the checkpoint before it"
            ) from error
        found.append(Generation(manifest_path.parent, position, manifest))
    return sorted(found, key=lambda generation: generation.position)


def _check(generation: Generation, run: Run) -> None:
    folder, manifest = generation.folder, generation.manifest
    if manifest["digest"] != derive.run_digest(run):
        raise CheckpointError(f"{folder}: belongs to a run with another config; use a run folder of its own")
    _check_layout(generation, run)
    for name, recorded in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != recorded["bytes"]:
            said = "is missing" if size is None else f"has {size} bytes, not {recorded['bytes']}"
            raise CheckpointError(f"{path} {said}; move {folder} away to go on from the checkpoint before it")


def _check_layout(generation: Generation, run: Run) -> None:
    """The distributed optimizer's state can be shared out anew over data-parallel ranks only (`torch_dist`)."""
    now, then = run.parallel.model_dump(), generation.manifest["layout"]
    keys = ("tensor", "pipeline", "distributed_optimizer")
    changed = [f"{key} = {then[key]}, not {now[key]}" for key in keys if then[key] != now[key]]
    if changed and (now["distributed_optimizer"] or then["distributed_optimizer"]):
        raise CheckpointError(
            f"{generation.folder}: was saved with parallel.{', parallel.'.join(changed)}; with the distributed "
            "optimizer only the number of data-parallel ranks may change: go on with that layout"
        )


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3": files.digest_file(path)} for path in paths
    }
