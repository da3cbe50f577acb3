"""Work on a folder that goes on where a killed process left it, and that appears under its name when all is done.

`weights` and `from_hf` write large files into `<out>.pending`. Each finished file is noted in `progress.jsonl`, with
its digest, once it is on disk; the first line says what is being converted, and how. A process that finds such a folder
of the very same conversion keeps the noted files, after reading them against their digests, and writes the others.

A finished folder takes the place of an older one by two renames, and the older one lies in `<out>.old.pending` until
the new one is there: `out` is whole whenever it is there. A start after a kill in between does what is left of it.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError, CrystalError

PROGRESS = "progress.jsonl"


class Work:
    """A pending folder. `finished`: file name -> what was noted of it (`bytes`, `xxh3`, and the caller's own)."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.finished = _taken_over(folder, json.loads(json.dumps(identity)))
        for path in folder.iterdir():
            if path.name not in (PROGRESS, *self.finished):
                files.remove_folder(path) if path.is_dir() else path.unlink()
        if not self.finished:
            files.write_file(folder / PROGRESS, json.dumps({"identity": identity}) + "\n")

    def note(self, name: str, nbytes: int, digest: str, **more: Any) -> dict[str, Any]:
        """Notes that a file is complete and on disk; returns the note as it will be read again."""
        note: dict[str, Any] = json.loads(json.dumps({"file": name, "bytes": nbytes, "xxh3": digest, **more}))
        files.append_line(self.folder / PROGRESS, note)
        files.fsync_path(self.folder / PROGRESS)
        self.finished[name] = note
        return note


@contextlib.contextmanager
def working(out: Path, identity: dict[str, Any], marker: str, overwrite: bool) -> Iterator[Work]:
    """The pending folder of `out`, for one process at a time; it becomes `out` when the block ends without an error.

    What makes `out` complete (`marker` among it) is written by the block. An existing `out` is replaced if `overwrite`;
    see `check_destination`. Finished files stay for the next time when the process is stopped or the disk refuses;
    nothing stays after any other error. Raises RunError where another process is at it.
    """
    _check_name(out)
    files.make_folder(out.parent)
    pending = _beside(out, "")
    with _alone(out):
        _settle(out, marker)
        check_destination(out, marker, overwrite)
        files.make_folder(pending)
        work = None
        try:
            with files.disk_errors(pending):
                work = Work(pending, identity)
                yield work
        except (CrystalError, OSError) as error:
            if isinstance(error, CheckpointError) or not (work and work.finished):
                files.remove_folder(pending)
            raise
        with files.disk_errors(out):
            files.fsync_folder(pending)
            if out.exists():
                os.rename(out, _beside(out, ".old"))
            _put_in_place(pending, out)
        _discard(_beside(out, ".old"), marker)


def settle(out: Path, marker: str) -> None:
    """Does what is left to do where a process was killed as it put a finished folder in the place of `out`.

    Raises RunError where a living process is at it.
    """
    _check_name(out)
    if any(_beside(out, what).exists() for what in ("", ".old", ".lock")):
        with _alone(out):
            _settle(out, marker)


def _settle(out: Path, marker: str) -> None:
    pending, old = _beside(out, ""), _beside(out, ".old")
    with files.disk_errors(out):
        if not out.exists():
            moved = (old / marker).is_file()
            if (pending / marker).is_file() and (moved or not (pending / PROGRESS).exists()):
                _put_in_place(pending, out)
            elif moved:  # the new one was taken away by somebody
                os.rename(old, out)
    _discard(old, marker)


def _put_in_place(pending: Path, out: Path) -> None:
    (pending / PROGRESS).unlink(missing_ok=True)
    files.fsync_path(pending)
    os.rename(pending, out)
    files.fsync_path(out.parent)


def _discard(old: Path, marker: str) -> None:
    with files.disk_errors(old):
        (old / marker).unlink(missing_ok=True)  # first: half of a folder must not look like one
    files.remove_folder(old)


def _check_name(out: Path) -> None:
    """What is beside `demo` must not be taken for what is beside `demo.old`."""
    if out.suffix in (".old", ".lock", files.PENDING):
        raise CheckpointError(
            f"{out}: names that end with {out.suffix} are for work in progress; choose another folder"
        )


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}{what}{files.PENDING}")


def _alone(out: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on `out`: beside what it guards, which is renamed."""
    pending = _beside(out, "")
    refusal = f"{pending}: another process is writing it; wait for it, or choose another folder"
    return files.locked(_beside(out, ".lock"), refusal)


def check_destination(out: Path, marker: str, overwrite: bool) -> None:
    """Raises CheckpointError where `out` exists: always if it is no conversion, else unless `overwrite`."""
    if not out.exists():
        return
    if not (out / marker).is_file():
        raise CheckpointError(f"{out}: exists and is no {_KINDS[marker]}; choose another folder")
    if not overwrite:
        raise CheckpointError(
            f"{out}: holds an {_KINDS[marker]} already; choose another folder, or overwrite it (--overwrite)"
        )


_KINDS = {"export.json": "export", "import.json": "import"}


def _taken_over(folder: Path, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The notes on files of this very conversion that are as they were noted."""
    lines = list(files.read_lines(folder / PROGRESS))
    if not lines or lines[0].get("identity") != identity:
        return {}
    notes = {}
    for note in lines[1:]:
        path = folder / str(note.get("file"))
        if path.is_file() and path.stat().st_size == note.get("bytes") and files.digest_file(path) == note.get("xxh3"):
            notes[path.name] = note
    return notes
