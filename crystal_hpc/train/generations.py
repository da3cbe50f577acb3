"""The generations of a run on disk: which there are, whether their bytes are whole, and where the bad ones go.

`checkpoints/<phase>/step_00001500/` counts once it carries a manifest that fits the run and the place; `checkpoint`
writes it under a pending name and renames it, `retention` renames it back and deletes it. Beside the manifest may lie
`verified.json` (all bytes have been read back) and `kept.json` (never delete). What does not fit is moved to
`quarantine/`, with the reason. No torch here: login nodes list generations, too.
"""

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from crystal_hpc.train.state import Position

CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"
VERIFIED = "verified.json"
KEPT = "kept.json"
REASON = "reason.json"
PRUNED = ".pruned"

# Files that come and go beside a complete generation: our notes, those that a crash left half written, and what NFS
# makes of a file that is deleted while somebody reads it.
_PASSING = re.compile(rf"({re.escape(VERIFIED)}|{re.escape(KEPT)})(\.\d+{re.escape(files.PENDING)})?|\.nfs.*")
_BLOCK = 4 << 20

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Generation:
    """One complete checkpoint of a run."""

    folder: Path
    position: Position
    manifest: Manifest
    verified: dict[str, Any] | None
    """`time` and `by`, once all its bytes have been read back and compared."""
    kept: dict[str, Any] | None
    """`name` and `time`, if it is kept by name."""

    @property
    def label(self) -> str:
        """As people name it: PHASE/STEP."""
        return f"{self.manifest.phase}/{self.manifest.step}"


def generation_folder(run_folder: Path, run: Run, position: Position) -> Path:
    """Where the state after `position.step` steps of its phase belongs."""
    return run_folder / CHECKPOINTS / run.phases[position.phase].name / f"step_{position.step:08d}"


def generations(run_folder: Path, run: Run) -> list[Generation]:
    """Every complete generation of the run, in order of position; their files are not read.

    Raises CheckpointError where a manifest is there and cannot be read now.
    """
    found = [generation for _, generation in _folders(run_folder, run) if isinstance(generation, Generation)]
    return sorted(found, key=lambda generation: generation.position)


def latest(run_folder: Path, run: Run) -> Generation | None:
    """The generation furthest along."""
    found = generations(run_folder, run)
    return found[-1] if found else None


def damaged(run_folder: Path, run: Run) -> list[tuple[Path, str]]:
    """Folders that should be generations and, by their manifest alone, are none of this run's, each with the reason.

    Raises CheckpointError where a manifest is there and cannot be read now.
    """
    return [(folder, reason) for folder, reason in _folders(run_folder, run) if isinstance(reason, str)]


def _folders(run_folder: Path, run: Run) -> Iterator[tuple[Path, Generation | str]]:
    """Every folder that claims to be a complete generation, with the generation, or why it is none."""
    digest = derive.run_digest(run)
    for folder in sorted((run_folder / CHECKPOINTS).glob("*/step_*")):
        if folder.is_dir() and folder.suffix not in (files.PENDING, PRUNED):
            found = _examine(folder, run, digest)
            if found is not None:
                yield folder, found


def _examine(folder: Path, run: Run, digest: str) -> Generation | str | None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        if not folder.exists():
            return None  # moved away or deleted while we looked
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, IsADirectoryError):
            raise _unreadable(folder / MANIFEST, cause) from error
        return str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    reason = _misplaced(folder, manifest, run, digest)
    if reason:
        return reason
    position = Position.from_named(run, {"phase": manifest.phase, "step": manifest.step})
    return Generation(folder, position, manifest, read_verified(folder), read_kept(folder))


def _misplaced(folder: Path, manifest: Manifest, run: Run, digest: str) -> str | None:
    """Why a sound manifest is not that of a generation of this run in this place."""
    if manifest.digest != digest:
        return f"belongs to a run with another config ({manifest.run}, digest {manifest.digest}, not {digest})"
    if manifest.phase != folder.parent.name or f"step_{manifest.step:08d}" != folder.name:
        return f"lies in the place of another: its manifest says phase {manifest.phase}, step {manifest.step}"
    if manifest.kind != "training":
        return "holds weights alone, not a state of training; name it as start_from of a run"
    phase = next((phase for phase in run.phases if phase.name == manifest.phase), None)
    if phase is None:
        return f"is of phase {manifest.phase}, which the run does not have"
    if not 0 <= manifest.step <= derive.phase_steps(phase):
        return f"is of step {manifest.step}, and phase {phase.name} has {derive.phase_steps(phase)} steps"
    return None


# Of a mark that cannot be made out: better verified again than taken on trust, and better kept than deleted.


def read_verified(folder: Path) -> dict[str, Any] | None:
    """`time` and `by`, if all bytes of the generation have been read back and compared."""
    note = _read_note(folder / VERIFIED)
    return note if note and isinstance(note.get("time"), int | float) else None


def read_kept(folder: Path) -> dict[str, Any] | None:
    """`name` and `time`, if the generation is kept by name."""
    note = _read_note(folder / KEPT)
    if note is not None and not isinstance(note.get("name"), str):
        return {"name": f"by a damaged {KEPT}", "time": 0.0}
    return note


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note = files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    except OSError as error:
        raise _unreadable(path, error) from error
    return note if isinstance(note, dict) else {}


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = error.strerror or str(error)
    return CheckpointError(
        f"{path}: cannot be read now ({reason}); this says nothing of its content: see to the storage and try again"
    )


def share_of(manifest: Manifest, rank: int, size: int) -> list[str]:
    """The files that rank `rank` of `size` should read: each file is one rank's, their bytes are about equally many."""
    loads, mine = [0] * size, []
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += entry.bytes
        if least == rank:
            mine.append(name)
    return mine


def find_damage(
    folder: Path, manifest: Manifest, names: Sequence[str] | None = None, on_progress: OnProgress | None = None
) -> list[str]:
    """Reads files of a generation and compares them with its manifest: what is wrong, one clause a file.

    By default all files, and `unlisted` ones are named too; with `names`, those files alone. `on_progress` is called
    often, and may raise to end the reading. Raises CheckpointError where a file is there and cannot be read now (a sick
    disk or server): no reason to give the generation up.
    """
    wanted = list(manifest.files) if names is None else list(names)
    findings = unlisted(folder, manifest) if names is None else []
    done, total = 0, sum(manifest.files[name].bytes for name in wanted)

    def read(count: int) -> None:
        nonlocal done
        done += count
        if on_progress:
            on_progress("verifying", done, total)

    for name in wanted:
        finding = _damage_of(folder / name, manifest.files[name], read)
        if finding:
            findings.append(f"{name} {finding}")
    return findings


class _Damage(Exception):
    """What is wrong with a file before its bytes are looked at."""


def _damage_of(path: Path, entry: FileEntry, read: Callable[[int], None]) -> str | None:
    digest = xxhash.xxh3_128()
    try:
        for block in _blocks(path, entry.bytes):
            digest.update(block)
            read(len(block))
    except _Damage as damage:
        return str(damage)
    if digest.hexdigest() != entry.xxh3:
        return f"is damaged: its digest is {digest.hexdigest()}, not {entry.xxh3}"
    return None


def _blocks(path: Path, size: int) -> Iterator[memoryview]:
    try:
        with open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise _Damage(f"has {found} bytes, not {size}")
            block = memoryview(bytearray(min(_BLOCK, max(size, 1))))
            while count := file.readinto(block):
                yield block[:count]
    except FileNotFoundError:
        raise _Damage("is missing") from None
    except IsADirectoryError:
        raise _Damage("is a folder, not a file") from None
    except OSError as error:
        raise _unreadable(path, error) from error


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """What lies in a generation's folder and is not its own, one clause each."""
    known = {MANIFEST, *manifest.files}
    try:
        names = sorted(os.listdir(folder))  # it also has a network file system look again
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    return [f"{name} is not in the manifest" for name in names if name not in known and not _PASSING.fullmatch(name)]


def quarantine(run_folder: Path, folder: Path, reason: str) -> Path:
    """Moves a bad generation to `RUN/quarantine/`, with the reason inside, and returns where it is now.

    One rename, after which it counts no more; done again after a crash, it goes on. Nothing is overwritten. Only for
    who holds the run. Raises CheckpointError where the folder is not there or cannot be moved.
    """
    room = files.make_folder(run_folder / QUARANTINE)
    name = f"{folder.parent.name}-{folder.name}"
    taken = {path.name for path in room.iterdir()}
    number = 2
    while name in taken:
        name = f"{folder.parent.name}-{folder.name}.{number}"
        number += 1
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, so it cannot be moved to {room}")
    with files.disk_errors(folder):
        files.write_json(folder / REASON, {"reason": reason, "time": time.time()})
        try:
            if folder.is_symlink():  # a relative one would lead nowhere from there
                os.symlink(folder.resolve(), room / name)
                os.unlink(folder)
            else:
                os.rename(folder, room / name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise CheckpointError(
                f"{folder}: {reason}; {room} is on another file system: move it away yourself"
            ) from error
        files.fsync_path(folder.parent)
        files.fsync_path(room)
    return room / name


def quarantined(run_folder: Path) -> list[tuple[Path, str]]:
    """What has been moved away, each with the reason, the oldest first."""
    found = []
    for folder in (run_folder / QUARANTINE).glob("*/"):
        note = _read_note(folder / REASON) or {}
        moment, reason = note.get("time"), note.get("reason")
        found.append((moment if isinstance(moment, int | float) else 0.0, folder, str(reason or "reason unknown")))
    return [(folder, reason) for _, folder, reason in sorted(found)]


def mark_verified(folder: Path, by: str) -> None:
    """Notes that all bytes of a generation have been read back and compared; `by` says who did it.

    Raises CheckpointError if it has been moved or deleted meanwhile, as `keep` does.
    """
    _write_note(folder / VERIFIED, {"time": time.time(), "by": by})


def keep(folder: Path, name: str) -> None:
    """Keeps a generation until `unkeep`, whatever the rules say. Raises CheckpointError for a name unfit to be read."""
    if not re.fullmatch(r"[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]{0,62}[^\s\x00-\x1f\x7f])?", name):
        raise CheckpointError(f"{name!r}: no name to keep a checkpoint by; use 1 to 64 characters on one line")
    _write_note(folder / KEPT, {"name": name, "time": time.time()})


def _write_note(path: Path, note: dict[str, Any]) -> None:
    try:
        files.write_json(path, note)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: is no longer there") from None


def unmark_verified(folder: Path) -> None:
    """Takes back that a generation has been verified: its bytes have been found to be others since."""
    _remove_note(folder / VERIFIED)


def unkeep(folder: Path) -> None:
    """Takes the name from a generation, if it has one."""
    _remove_note(folder / KEPT)


def _remove_note(path: Path) -> None:
    with files.disk_errors(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        files.fsync_path(path.parent)


def pending(run_folder: Path) -> list[Path]:
    """Folders of saves that go on, or were cut short, and of deletions that were."""
    room = run_folder / CHECKPOINTS
    return sorted(path for ending in (files.PENDING, PRUNED) for path in room.glob(f"*/step_*{ending}"))


def remove_pending(run_folder: Path) -> None:
    """Deletes what saves and deletions that were cut short have left. Only for who holds the run: none may go on."""
    for folder in pending(run_folder):
        files.remove_folder(folder)
