"""Checks a checkpoint's files against the digests in its manifest while something else reads the tensors in them."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import xxhash

from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.manifest import FileEntry

BLOCK = 4 << 20
AHEAD = 512 << 20  # bytes; what is read here is then still in the page cache when its tensors are wanted


class DigestCheck:
    """Reads whole files in a thread of its own, as far as the caller has come with its work, and a little further."""

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        self._folder = folder
        self._entries = entries
        self._allowed = AHEAD
        self._total = sum(entry.bytes for entry in entries.values())
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self, share: float) -> None:
        """Says how much of the work is done. Raises CheckpointError where a file was found to be damaged."""
        with self._changed:
            self._allowed = int(share * self._total) + AHEAD
            self._changed.notify()
        if self._error:
            raise self._error

    def finish(self) -> None:
        """Waits for the rest. Raises CheckpointError where a file is damaged."""
        self.advance(1.0)
        self._thread.join()
        if self._error:
            raise self._error

    def stop(self) -> None:
        """Ends the thread, whatever is left."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            done = 0
            for name, entry in self._entries.items():
                if not self._stopped:
                    done = self._check(self._folder / name, entry, done)
        except BaseException as error:  # raised where the caller asks
            self._error = error

    def _check(self, path: Path, entry: FileEntry, done: int) -> int:
        try:
            return self._compare(path, entry, done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error

    def _compare(self, path: Path, entry: FileEntry, done: int) -> int:
        digest, block = xxhash.xxh3_128(), bytearray(BLOCK)
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
                done += count
                if self._told_to_stop(done):
                    return done
        if digest.hexdigest() != entry.xxh3:
            raise CheckpointError(
                f"{path}: damaged (its digest is not the one in the manifest); use another checkpoint"
            )
        return done

    def _told_to_stop(self, done: int) -> bool:
        """Waits until the caller has come far enough."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or done <= self._allowed)
            return self._stopped
