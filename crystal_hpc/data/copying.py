"""Moves pieces of one file from shared storage to every node that lacks them: the data path of `staging`.

Pieces go in rounds of as many as there are ranks. In each, every rank reads one piece from shared storage, the ranks
agree that nothing has gone wrong anywhere, and each in turn gives its piece to all the others. A thread reads ahead
and another checks and writes, so that shared storage, network and disk are busy at the same time; one process alone
does the same without a network.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from crystal_hpc.comm import BytesComm
from crystal_hpc.data.scratch import scratch_errors
from crystal_hpc.errors import CrystalError, StoreError

PIECE = 1 << 22  # bytes: large enough for any file system, a multiple of a digest's block
T = TypeVar("T")


class Stopped(Exception):
    """Some rank was told to stop; all of them leave together."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a file."""

    start: int
    size: int


def pieces_of(start: int, stop: int) -> list[Piece]:
    """Bytes start..stop-1 in pieces."""
    return [Piece(at, min(PIECE, stop - at)) for at in range(start, stop, PIECE)]


def together(comm: BytesComm, act: Callable[[], T], should_stop: Callable[[], bool] = lambda: False) -> T:
    """Does something on every rank. What one rank raises (CrystalError), all do; Stopped if one was told to stop."""
    result: T | None = None
    problem: CrystalError | None = None
    stop = should_stop()
    try:
        result = act()
    except CrystalError as error:
        problem = error
    except Stopped:
        stop = True
    agree(comm, problem, stop)
    return result  # type: ignore[return-value] # agree has raised where there is none


def agree(comm: BytesComm, problem: CrystalError | None, stop: bool) -> None:
    """Raises on every rank what was a problem on one; a collective call."""
    told = comm.gather((problem, stop))
    for found, _ in told:
        if found is not None:
            raise found
    if any(stopped for _, stopped in told):
        raise Stopped


class _Ring:
    """Buffers of one piece each, used in turn; one is handed out again when what was done with it is over."""

    def __init__(self, count: int) -> None:
        self._buffers = [memoryview(bytearray(PIECE)) for _ in range(count)]
        self._users: list[Future[None] | None] = [None] * count
        self._next = 0

    def take(self) -> int:
        number, self._next = self._next, (self._next + 1) % len(self._buffers)
        user = self._users[number]
        if user is not None:
            user.result()
        return number

    def view(self, number: int, size: int) -> memoryview:
        return self._buffers[number][:size]

    def used_by(self, number: int, user: Future[None]) -> None:
        self._users[number] = user


class Copier:
    """Copies pieces of files, with buffers that live as long as it does. Every rank makes the same calls."""

    def __init__(self, comm: BytesComm, should_stop: Callable[[], bool]) -> None:
        self._comm, self._should_stop = comm, should_stop
        self._reading, self._receiving = _Ring(3), _Ring(2)
        self._trouble: CrystalError | None = None
        self.read = 0
        """Bytes that this rank has read from shared storage."""

    def copy(self, source: Path, pieces: Sequence[Piece], turn: int, take: Callable[[Piece, memoryview], None]) -> None:
        """Brings pieces of a file to all ranks; `take` is called with each, in order, on a thread.

        `turn` counts the tries: each shifts which rank reads what, and after the first one no memory of the file is
        trusted. What goes wrong on any rank, in `take` too, is raised on every one.
        """
        size, rank = self._comm.size, self._comm.rank
        rounds = [pieces[first : first + size] for first in range(0, len(pieces), size)]
        mine = [(rank - turn) % size] * len(rounds)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, _closing(source, turn > 0) as opened:
            ahead = self._read_ahead(reader, opened, rounds, 0, mine)
            for number, round_ in enumerate(rounds):
                own, reading = ahead
                problem = reading.result() if reading else None
                agree(self._comm, problem or self._trouble, self._should_stop())
                ahead = self._read_ahead(reader, opened, rounds, number + 1, mine)
                for place, piece in enumerate(round_):
                    root = (place + turn) % size
                    ring, buffer = (self._reading, own) if root == rank else (self._receiving, self._receiving.take())
                    self._comm.share(ring.view(buffer, piece.size), root)
                    ring.used_by(buffer, writer.submit(self._take, take, piece, ring.view(buffer, piece.size)))
        agree(self._comm, self._trouble, self._should_stop())

    def _read_ahead(
        self, reader: ThreadPoolExecutor, source: "_Source", rounds: list[Sequence[Piece]], number: int, mine: list[int]
    ) -> tuple[int, "Future[CrystalError | None] | None"]:
        """Begins to read this rank's piece of a round, if it has one; the buffer, and what comes of it."""
        if number >= len(rounds) or mine[number] >= len(rounds[number]):
            return 0, None
        piece, buffer = rounds[number][mine[number]], self._reading.take()
        self.read += piece.size
        return buffer, reader.submit(source.read, piece, self._reading.view(buffer, piece.size))

    def _take(self, take: Callable[[Piece, memoryview], None], piece: Piece, data: memoryview) -> None:
        if self._trouble is not None:
            return
        try:
            take(piece, data)
        except CrystalError as error:
            self._trouble = error  # the others hear of it before the next round


class _Source:
    """A file on shared storage, opened when the first piece is read from it."""

    def __init__(self, path: Path, again: bool) -> None:
        self._path, self._again, self._descriptor = path, again, -1

    def read(self, piece: Piece, into: memoryview) -> CrystalError | None:
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, os.O_RDONLY)
            if self._again:  # from the storage itself, not from this node's memory of it
                os.posix_fadvise(self._descriptor, piece.start, piece.size, os.POSIX_FADV_DONTNEED)
            done = 0
            while done < piece.size:
                count = os.preadv(self._descriptor, [into[done:]], piece.start + done)
                if count == 0:
                    return StoreError(f"{self._path}: ends at byte {piece.start + done}; copy the store again")
                done += count
        except OSError as error:
            return StoreError(f"{self._path}: cannot be read ({error.strerror})")
        return None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


@contextlib.contextmanager
def _closing(path: Path, again: bool) -> Iterator[_Source]:
    source = _Source(path, again)
    try:
        yield source
    finally:
        source.close()


def write_at(descriptor: int, data: memoryview, start: int, path: Path) -> None:
    """Writes all of the data. Raises DiskError."""
    with scratch_errors(path):
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], start + done)
