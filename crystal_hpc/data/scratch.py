"""Where staged data lies on a node's own disk, who is using it, and how room is made there.

    FOLDER/crystal/stores/<digest of the store>/    copies of whole stores (`data/staging`)
    FOLDER/crystal/slices/<digest of the run>/      rows in the order of reading (`data/slices`)

Names say what is inside, so a later attempt, phase or run finds it. Whoever uses a folder holds a lock on its `.lock`,
shared to read and exclusive to write; the system lets go of it when a process dies, however it dies. So a folder whose
lock is free belongs to nobody, and may go: half a copy because its job is dead, a whole one when the room is needed.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from crystal_hpc.data.catalog import STORE_FILE
from crystal_hpc.errors import DiskError
from crystal_hpc.files import disk_errors, make_folder, remove_folder

LOCK = ".lock"


def scratch_folder(folder: str) -> Path:
    """The folder that a profile names, with $NAME and ${NAME} as they are on this node. Raises DiskError."""
    path = os.path.expandvars(folder)
    unset = re.search(r"\$\{?(\w+)", path)
    if unset:
        raise DiskError(f"{folder}: {unset[1]} is not set here; set it, or name the node's own disk in staging.folder")
    if not os.path.isabs(path):
        raise DiskError(f"{path}: not an absolute path; name a folder on the node's own disk in staging.folder")
    return Path(path)


def stores_folder(scratch: Path) -> Path:
    """Where copies of stores lie, each under its digest."""
    return scratch / "crystal" / "stores"


def slices_folder(scratch: Path) -> Path:
    """Where slices lie, each run's under its digest."""
    return scratch / "crystal" / "slices"


@contextlib.contextmanager
def scratch_errors(path: Path) -> Iterator[None]:
    """Turns whatever a node's disk says, a broken one too, into a DiskError: staging is given up, never the job."""
    try:
        with disk_errors(path):
            yield
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}") from error


class Lock:
    """A lock on a folder, held until `release` or the end of the process; children do not inherit it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def share(self) -> None:
        """Lets other readers in; writers stay out."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        """Gives the folder free."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock(folder: Path, exclusive: bool) -> Lock | None:
    """Locks a folder that exists; None if somebody else is there. Raises DiskError where the disk refuses."""
    path = folder / LOCK
    with scratch_errors(folder):
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _is_still(path, descriptor):
                return Lock(descriptor)
            os.close(descriptor)  # whoever removed the folder was quicker: make it again
            make_folder(folder)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_if_free(folder: Path) -> bool:
    """Deletes a folder that nobody uses; whether it is gone."""
    held = lock(folder, exclusive=True)
    if held is None:
        return False
    remove_folder(folder)
    held.release()
    return True


def clean(scratch: Path, keep: Collection[Path]) -> int:
    """Removes what dead jobs left: half copies of stores, and slices, that nobody uses. Returns how many folders.

    `keep` names folders that are about to be used.
    """
    stores = [path for path in _folders(stores_folder(scratch)) if not (path / STORE_FILE).exists()]
    left = [*stores, *_folders(slices_folder(scratch))]
    return sum(remove_if_free(path) for path in left if path not in keep)


def make_room(scratch: Path, needed: int, keep: Collection[Path]) -> int:
    """Removes whole copies that nobody uses, the oldest first, until `needed` bytes are free. Returns what is free."""
    copies = [path for path in _folders(stores_folder(scratch)) if path not in keep and (path / STORE_FILE).exists()]
    copies.sort(key=lambda path: (path / STORE_FILE).stat().st_mtime)
    for path in copies:
        if free_bytes(scratch) >= needed:
            break
        remove_if_free(path)
    return free_bytes(scratch)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where a folder lies."""
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
