"""Work on a folder that goes on where a killed process left it, and that appears under its name when all is done.

`weights` and `from_hf` write large files into `<out>.pending`. Each finished file is noted in `progress.jsonl`, with
its digest, once it is on disk; the first line says what is being converted, and how. A process that finds such a folder
of the very same conversion keeps the noted files, after reading them against their digests, and writes the others.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError, CrystalError

PROGRESS = "progress.jsonl"
LOCK = "lock"


class Work:
    """A pending folder. `finished`: file name -> what was noted of it (`bytes`, `xxh3`, and the caller's own)."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.finished = _taken_over(folder, json.loads(json.dumps(identity)))
        for path in folder.iterdir():
            if path.name not in (PROGRESS, LOCK, *self.finished):
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
    check_destination(out, marker, overwrite)
    pending = out.with_name(out.name + files.PENDING)
    files.make_folder(pending)
    with files.locked(
        pending / LOCK, f"{pending}: another process is writing it; wait for it, or choose another folder"
    ):
        work = None
        try:
            with files.disk_errors(pending):
                work = Work(pending, identity)
                yield work
                (pending / PROGRESS).unlink()
                (pending / LOCK).unlink()
            _commit(pending, out)
        except (CrystalError, OSError) as error:
            if isinstance(error, CheckpointError) or not (work and work.finished):
                files.remove_folder(pending)
            raise


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
