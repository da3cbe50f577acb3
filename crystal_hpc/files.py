"""How anything durable reaches the disk: the one commit rule of the package.

Write under a temporary name, flush, fsync, rename; the marker (a manifest, `store.json`) comes last. A crash at any
instant leaves the old state or the new one, never a mixture. Readers accept only what carries its marker.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from crystal_hpc.errors import DiskError, RunError

PENDING = ".pending"
EARLY = 8 << 20  # bytes after which the disk is given work
# Bytes for one write(): few enough to be in the processor's cache still when they are hashed. For 64 MiB at once, Linux
# looks for memory in large pieces, which can take ten times as long as the copying.
WRITTEN_AT_ONCE = 256 << 10
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that knows no locks."""

_REFUSALS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "permission denied; choose a folder that you may write",
    errno.EPERM: "permission denied; choose a folder that you may write",
    errno.EFBIG: "the file is larger than this file system or user may write",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
}


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turns the refusals of a file system (full, read-only, not ours) into a `DiskError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = _REFUSALS.get(error.errno or 0) or _refusal_in(error)
        if reason is None:
            raise
        raise DiskError(f"{path}: {reason}") from error
    except RuntimeError as error:
        reason = _refusal_in(error)
        # torch's archive writer knows no errno: it says that it is not where it should be in the file.
        if "inline_container" in str(error) and not _has_room(Path(path)):
            reason = _REFUSALS[errno.ENOSPC]
        if reason is None:
            raise
        raise DiskError(f"{path}: {reason}") from error


def _refusal_in(error: Exception) -> str | None:
    """What to say of an error of HDF5's or torch's, which wrap the errno of a failed write into their text."""
    said = str(error).lower()
    return next((reason for code, reason in _REFUSALS.items() if os.strerror(code).lower() in said), None)


def _has_room(path: Path, enough: int = 1 << 20) -> bool:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(existing).free > enough


def fsync_path(path: Path) -> None:
    """Forces a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents; a refusal is a `DiskError`."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_file(path: Path, content: str | bytes) -> None:
    """Replaces a file whole: temporary name, fsync, rename, fsync of the folder."""
    data = content.encode() if isinstance(content, str) else content
    pending = path.with_name(f"{path.name}.{os.getpid()}{PENDING}")
    with disk_errors(path):
        try:
            with open(pending, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(pending, path)
        except OSError:
            pending.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Replaces a file whole by what the block writes under the name that it gets: fsync, rename."""
    pending = path.with_name(f"{path.name}.{os.getpid()}{PENDING}")
    with disk_errors(path):
        try:
            yield pending
            fsync_path(pending)
            os.replace(pending, path)
        finally:
            pending.unlink(missing_ok=True)
        fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file whole, indented for people."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises OSError or ValueError as `open` and `json` do."""
    return json.loads(path.read_bytes())  # bytes: JSON is UTF-8, whatever the locale says


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Adds one JSON line. A line cut short by a crash of an earlier writer is closed first, never run into."""
    with disk_errors(path), open(path, "ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(json.dumps(value).encode() + b"\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file, less any that a crash cut short."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def last_line(path: Path, within: int = 1 << 16) -> dict[str, Any] | None:
    """The last whole JSON line of a file, found in its last `within` bytes; None if there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - within))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    return value
    return None


def fsync_folder(path: Path) -> None:
    """Forces a folder to the disk, and all that is in it."""
    for folder, _, names in os.walk(path):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def commit_folder(pending: Path, final: Path) -> None:
    """Makes a finished folder visible under its final name: fsync of every file, then one rename.

    The caller has written the folder's marker last; `final` must not exist.
    """
    with disk_errors(final):
        fsync_folder(pending)
        os.rename(pending, final)
        fsync_path(final.parent)


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Keeps other processes out of the block, on this host and (where locks work there) on shared storage.

    The file at `path` is there as long as the lock is held, or longer where its holder was killed. Raises RunError with
    `refusal` if another is inside.
    """
    with disk_errors(path), open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(refusal) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if not _is_still(path, file):  # its holder removed it after we had opened it
            raise RunError(refusal)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class HashedFile:
    """A new file, the digest of whose bytes is taken on their way out; as much of a file as torch.save wants.

    Small pieces are gathered, large ones go straight to the kernel. Refusals of the disk are OSErrors.
    """

    def __init__(self, path: Path) -> None:
        import xxhash

        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._hash = xxhash.xxh3_128()
        self._small = bytearray()
        self._size = self._written = self._started = 0

    def write(self, data: Any) -> int:
        """Appends bytes."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        if len(view) < 1 << 16:
            self._small += view
            if len(self._small) >= 1 << 20:
                self.flush()
        else:
            self.flush()
            self._put(view)
        return len(view)

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Hands the kernel what is still gathered."""
        small, self._small = self._small, bytearray()
        self._put(memoryview(small))

    def close(self) -> None:
        """Forces the file to the disk."""
        self.flush()
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def abandon(self) -> None:
        """Closes the file as it is."""
        with contextlib.suppress(OSError):  # a network file system may refuse bytes as late as in the first close
            os.close(self._descriptor)

    def digest(self) -> str:
        """xxh3-128 of all that was written, in hex."""
        return self._hash.hexdigest()

    def _put(self, view: memoryview) -> None:
        while view:
            block = view[:WRITTEN_AT_ONCE]
            count = os.write(self._descriptor, block)
            self._hash.update(block[:count])
            self._written, view = self._written + count, view[count:]
            self._begin_writeback()

    def _begin_writeback(self) -> None:
        """Asked to drop what is not on the disk yet, the kernel begins to write it; else most waits for the fsync."""
        length = self._written - self._started
        if length >= EARLY:
            os.posix_fadvise(self._descriptor, self._started, length, os.POSIX_FADV_DONTNEED)
            self._started = self._written


def read_into(descriptor: int, target: memoryview, at: int) -> None:
    """Fills `target` with the bytes of an open file from `at` on. Raises EOFError where it ends before."""
    while target:
        count = os.preadv(descriptor, [target[: 1 << 30]], at)
        if not count:
            raise EOFError("the file ends too early")
        target, at = target[count:], at + count


def remove_folder(path: Path) -> None:
    """Deletes a folder that may not exist."""
    shutil.rmtree(path, ignore_errors=True)


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex (a check against damage, not against an attacker)."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def wait_until_visible(path: Path, seconds: float = 60.0) -> bool:
    """Waits for another node's file to show on shared storage; listing the folder drops a stale NFS cache."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.1)
    return True
