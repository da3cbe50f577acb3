"""Back from disk: the newest generation whose every byte is as it was written, into whatever layout asks for it.

All ranks read the files back, each its share, and compare digests before anything is loaded. A generation that is
damaged, or is not of this run, is moved to `quarantine/` with the reason, and the one before it is taken. A run that
has lost all its generations does not quietly begin again. Nothing in a folder is executed (`distcp`).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crystal_hpc.comm import Comm
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import CheckpointError, CrystalError, DiskError
from crystal_hpc.log import log
from crystal_hpc.train import generations, optim, sharding
from crystal_hpc.train.distcp import Reader, Request
from crystal_hpc.train.generations import Generation
from crystal_hpc.train.keys import MAIN, STATE
from crystal_hpc.train.manifest import Manifest, read_manifest
from crystal_hpc.train.sharding import Part
from crystal_hpc.train.state import Position
from crystal_hpc.train.step import Trainer

Progress = Callable[[str, int, int], None]

_NOT_DAMAGE = {
    "another config": "use a run folder of its own, or the config of that run",
    "this version reads": "go on with the version of crystal_hpc that wrote it",
}
"""What may be said of a manifest without anything being wrong with it, and what would be right then."""


class _Damaged(Exception):
    """A generation cannot be used, for a reason that lies in its files."""


def load_latest(
    trainer: Trainer, run_folder: Path, on_progress: Progress | None = None
) -> tuple[Position, Manifest | None]:
    """Loads the newest good generation, or what the run starts from. A collective call.

    Returns where the run stands, and the manifest of what was loaded (None at the start of a run). What cut-short
    saves have left is deleted. `on_progress` is called often while files are read, and may raise to end it.
    Raises CheckpointError where generations are there, or were, and none can be used.
    """
    comm = trainer.layout.comm
    if comm.rank == 0:
        generations.remove_pending(run_folder)
    while True:
        found: Generation | None = _agreed(comm, lambda: _newest(run_folder, trainer.run))
        if found is None:
            _begin(trainer, on_progress)
            return Position(0, 0), None
        damage = _try_to_load(trainer, found, on_progress)
        if damage is None:
            return found.position, found.manifest
        moved = _agreed(comm, partial(generations.quarantine, run_folder, found.folder, damage))
        if comm.rank == 0:
            log.warning("%s: %s; moved to %s, going on from the checkpoint before it", found.folder, damage, moved)


def _try_to_load(trainer: Trainer, found: Generation, on_progress: Progress | None) -> str | None:
    """Loads a generation; returns what is wrong with it, if that is in its files."""
    try:
        _verify(trainer.layout.comm, found.folder, found.manifest, on_progress)
        _load(trainer, found.folder, found.manifest)
    except _Damaged as damage:
        return str(damage)
    if trainer.layout.comm.rank == 0:
        try:
            generations.mark_verified(found.folder, "the start of an attempt")
        except DiskError as error:  # a note, on a disk that may be full: the run can do without
            log.warning("%s is verified, which could not be noted: %s", found.folder, error)
    return None


def load_model(trainer: Trainer, run_folder: Path, position: Position) -> None:
    """Loads the weights, and nothing else, of the generation at a position. A collective call.

    Raises CheckpointError if there is none, or it is damaged.
    """
    comm = trainer.layout.comm
    folder = generations.generation_folder(run_folder, trainer.run, position)
    manifest = _agreed(comm, lambda: read_manifest(folder))
    try:
        _verify(comm, folder, manifest, None)
        _read(comm, folder, sharding.model_parts(sharding.module(trainer)), {})
    except _Damaged as damage:
        raise CheckpointError(f"{folder}: {damage}") from None


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path, comm: Comm) -> None:
    """Fills a Megatron model from the tensors in a folder, whose digests are not asked. A collective call.

    Raises CheckpointError where the folder does not have what the model wants.
    """
    try:
        _read(comm, folder, sharding.model_parts(model), {})
    except _Damaged as damage:
        raise CheckpointError(f"{folder}: {damage}") from None


def _newest(run_folder: Path, run: Run) -> Generation | None:
    """The newest generation by its manifest; what is none is moved away. Rank 0 alone asks."""
    found, bad = generations.generations(run_folder, run), generations.damaged(run_folder, run)
    for changed, help_ in _NOT_DAMAGE.items():
        others = [(folder, reason) for folder, reason in bad if changed in reason]
        if others and not found:
            # Not the checkpoints are what changed: moving them away would help nobody.
            raise CheckpointError(f"{others[-1][0]}: {others[-1][1]}; {help_}")
    for folder, reason in bad:
        moved = generations.quarantine(run_folder, folder, reason)
        log.warning("%s: %s; moved to %s", folder, reason, moved)
    if found:
        return found[-1]
    lost = generations.quarantined(run_folder)
    if lost:
        folder, reason = lost[-1]
        raise CheckpointError(
            f"{run_folder}: none of its checkpoints can be used (the last to go: {folder.name}, {reason}); bring a "
            "good one back, or begin a run under another name: this one will not begin again by itself"
        )
    return None


def _verify(comm: Comm, folder: Path, manifest: Manifest, on_progress: Progress | None) -> None:
    """Has the ranks compare every file with its digest; a second rank confirms what a first one finds."""
    findings = _shared(comm, lambda: _findings(comm, folder, manifest, on_progress))
    suspects = sorted({name for _, name in findings})
    if not suspects:
        return
    # Read again by other ranks: a node with bad memory must not cost a run its checkpoints.
    again = {name: (rank + 1) % comm.size for rank, name in reversed(findings)}
    mine = [name for name in suspects if again[name] == comm.rank]
    confirmed = _shared(comm, lambda: generations.find_damage(folder, manifest, mine))
    if comm.rank == 0 and (more := generations.unlisted(folder, manifest)):
        log.warning("%s: %s", folder, "; ".join(more))
    if confirmed:
        raise _Damaged("; ".join(confirmed))
    ranks = sorted({rank for rank, _ in findings})
    raise CheckpointError(
        f"{folder}: rank {ranks[0]} reads other bytes of {suspects[0]} than the rank after it: distrust its node "
        "(memory, network or disk cache) and exclude it"
    )


def _findings(comm: Comm, folder: Path, manifest: Manifest, on_progress: Progress | None) -> list[tuple[int, str]]:
    """(rank, file) for each file of this rank's share that is not as the manifest says."""
    names = generations.share_of(manifest, comm.rank, comm.size)
    return [(comm.rank, name) for name in names if generations.find_damage(folder, manifest, [name], on_progress)]


@torch.no_grad()
def _load(trainer: Trainer, folder: Path, manifest: Manifest) -> None:
    """Model and optimizer, whatever the layout that wrote them."""
    optim.reset_state(trainer.optimizer)
    parts = sharding.model_parts(sharding.module(trainer)) + sharding.optimizer_parts(trainer)
    _read(trainer.layout.comm, folder, parts, {}, complete=True)
    optim.set_steps(trainer.optimizer, (manifest.optimizer or {}).get("steps", 0))


@torch.no_grad()
def _begin(trainer: Trainer, on_progress: Progress | None) -> None:
    """The weights that the run starts from, where its config names some; the optimizer's moments are zero."""
    if trainer.run.start_from is None:
        return
    comm, folder = trainer.layout.comm, Path(trainer.run.start_from)
    manifest = _agreed(comm, lambda: read_manifest(folder))
    optim.reset_state(trainer.optimizer)
    mains = [part for part in sharding.optimizer_parts(trainer) if part.key.startswith(f"{STATE}{MAIN}.")]
    try:
        _verify(comm, folder, manifest, on_progress)
        # Float32 copies where there are any, which are what was trained; else the weights themselves are all there is.
        weights = [_exact(part) for part in sharding.model_parts(sharding.module(trainer))]
        parts = weights + mains
        _read(comm, folder, parts, {f"{STATE}{MAIN}.": ""})
    except _Damaged as damage:
        raise CheckpointError(f"start_from: {folder}: {damage}; name another") from None
    log.info("starting from the weights in %s (%s, step %d)", folder, manifest.phase, manifest.step)


def _exact(part: Part) -> Part:
    """Float32 weights are filled from the float32 copies that a bfloat16 run keeps, not from what it rounds them to."""
    return replace(part, key=f"{STATE}{MAIN}.{part.key}") if part.tensor.dtype == torch.float32 else part


@torch.no_grad()
def _read(comm: Comm, folder: Path, parts: list[Part], instead: dict[str, str], complete: bool = False) -> None:
    """Fills the parts from a folder. A key that is not there is looked for under another prefix (`instead`).

    Raises _Damaged, on all ranks, where the folder does not have what this model wants; with `complete`, also where it
    has more. Raises CheckpointError where the machine could not read it.
    """

    def read() -> list[str]:
        try:
            reader = Reader(folder)
            requests, problems = [], []
            for part in parts:
                key = _key_in(reader, part.key, instead)
                if key is None:
                    problems.append(f"has no tensor {part.key}")
                elif reader.shape(key) != part.shape:
                    problems.append(f"{key} has shape {reader.shape(key)}, and this model's has {part.shape}")
                else:
                    requests.append(Request(key, part.offset, part.tensor))
            if not problems:
                reader.read(requests)
        except CheckpointError as error:
            if _is_of_the_machine(error.__cause__):
                raise CheckpointError(
                    f"{error}; this says nothing of its content: see to the storage and the memory, and try again"
                ) from error
            return [str(error).removeprefix(f"{folder}: ")]
        if complete and not problems:
            keys.update(reader.tensors)
        return problems[:1]

    keys: set[str] = set()
    problems = _shared(comm, read)
    if problems:
        raise _Damaged(problems[0])
    if complete:
        wanted = {key for held in comm.gather({part.key for part in parts}) for key in held}
        if left_over := sorted(keys - wanted):
            raise _Damaged(f"holds {left_over[0]}, for which this model has no place")


def _is_of_the_machine(cause: BaseException | None) -> bool:
    """Whether reading failed for want of memory, or by a sick disk or server: no reason to give a generation up."""
    if isinstance(cause, OSError):
        return not isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    return isinstance(cause, RuntimeError) and bool(re.search("allocate memory|out of memory", str(cause)))


def _key_in(reader: Reader, key: str, instead: dict[str, str]) -> str | None:
    if key in reader.tensors:
        return key
    others = (other + key.removeprefix(prefix) for prefix, other in instead.items() if key.startswith(prefix))
    return next((other for other in others if other in reader.tensors), None)


def _agreed(comm: Comm, ask: Callable[[], Any]) -> Any:
    """Rank 0's answer, or its error, on every rank."""
    answer: Any = None
    if comm.rank == 0:
        try:
            answer = ask()
        except CrystalError as error:
            answer = error
    answer = comm.broadcast(answer)
    if isinstance(answer, CrystalError):
        raise answer
    return answer


def _shared(comm: Comm, work: Callable[[], list[Any]]) -> list[Any]:
    """What all ranks found, in order of rank; what one of them raises, all raise."""
    found: Any
    try:
        found = work()
    except CrystalError as error:
        found = error
    everything = comm.gather(found)
    for one in everything:
        if isinstance(one, CrystalError):
            raise one
    return [item for one in everything for item in one]
