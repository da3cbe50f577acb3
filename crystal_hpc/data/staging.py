"""Whole stores on every node's own disk, read from shared storage once, and never a byte of them unchecked.

`data/store` reads such a copy as it would read the original. Every rank here is one node. For each shard, the part
around its tokens comes first and is compared with the digest in store.json; it holds the digests of the tokens' blocks,
which then judge every piece of tokens as it arrives (`copying`). A shard is `<name>.pending` until all of it is there
and on the disk; store.json comes last. What half a copy has that is good is kept, what is bad is fetched again, and
what is bad three times is damaged at its source.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from crystal_hpc.comm import BytesComm
from crystal_hpc.data import scratch as disk
from crystal_hpc.data.catalog import STORE_FILE, ShardInfo, StoreInfo, read_store_info
from crystal_hpc.data.copying import PIECE, Copier, Piece, Stopped, pieces_of, together, write_at
from crystal_hpc.data.shard import BLOCK, REMEDY, Tokens, frame_digest
from crystal_hpc.data.store import TokenStore, damaged_block
from crystal_hpc.errors import DiskError, StoreError
from crystal_hpc.files import PENDING, fsync_path, make_folder, write_json
from crystal_hpc.log import log
from crystal_hpc.progress import Progress

TRIES = 3
ROOM = 1 << 20  # bytes to leave beside a store's files, for store.json and the file system itself


@dataclass
class Staged:
    """What came of staging, on this node."""

    folders: dict[str, Path] = field(default_factory=dict)
    """Where the copy of each store is, by digest."""
    read: int = 0
    """Bytes that this node read from shared storage; over all nodes, at most the size of the stores."""
    copied: int = 0
    """Bytes that were written here."""
    kept: int = 0
    """Bytes that were here already."""
    stopped: bool = False
    """Whether some rank was told to stop before the end; what is there is kept for the next time."""


def stage_stores(
    infos: Iterable[StoreInfo],
    scratch: Path,
    comm: BytesComm,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Progress | None = None,
) -> Staged:
    """Copies stores to `scratch` on the node of every rank (one rank a node; it may be another path on each).

    Raises on all ranks: DiskError where a disk is full, refuses, or holds a copy that another process is working on;
    StoreError where the source is damaged or cannot be read.
    """
    wanted = list({info.digest: info for info in infos}.values())
    staged = Staged()
    locks: list[disk.Lock] = []
    shown = _Shown(on_progress, sum(shard.bytes for info in wanted for shard in info.shards))
    try:
        copies = together(comm, lambda: _prepare(wanted, scratch, locks), should_stop)
        _refuse_too_small(comm, scratch, copies)
        copier = Copier(comm, should_stop)
        for copy in copies:
            staged.folders[copy.info.digest] = copy.folder
            _stage(copy, comm, copier, should_stop, staged, shown)
        staged.read = copier.read
    except Stopped:
        staged.stopped = True
    finally:
        for held in locks:
            held.release()
    return staged


class _Copy:
    """This node's copy of one store."""

    def __init__(self, info: StoreInfo, scratch: Path) -> None:
        self.info, self.folder = info, copy_folder(info, scratch)
        self.complete = read_copy(info, scratch) is not None

    def missing(self) -> int:
        """Bytes of the disk that it still needs."""
        return 0 if self.complete else ROOM + sum(self._missing(shard) for shard in self.info.shards)

    def _missing(self, shard: ShardInfo) -> int:
        for path in (self.folder / shard.name, self.pending(shard)):
            if path.exists():
                return max(0, shard.bytes - path.stat().st_blocks * 512)
        return shard.bytes

    def pending(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.name}{PENDING}"


def copy_folder(info: StoreInfo, scratch: Path) -> Path:
    """Where the copy of a store lies."""
    return disk.stores_folder(scratch) / info.digest


def read_copy(info: StoreInfo, scratch: Path) -> StoreInfo | None:
    """The store's description with the folder of its copy, if there is a whole one."""
    folder = copy_folder(info, scratch)
    try:
        found = read_store_info(folder)
    except (StoreError, OSError):
        return None
    return replace(info, folder=folder) if found.digest == info.digest else None


def _prepare(wanted: list[StoreInfo], scratch: Path, locks: list[disk.Lock]) -> list[_Copy]:
    """Cleans up, and locks what is to be written; locks already held when this raises are in `locks`."""
    keep = [copy_folder(info, scratch) for info in wanted]
    with disk.scratch_errors(scratch):
        make_folder(disk.stores_folder(scratch))
        disk.clean(scratch, keep)
        for folder in keep:
            make_folder(folder)
        copies = [_Copy(info, scratch) for info in wanted]
    for copy in copies:
        held = disk.lock(copy.folder, exclusive=not copy.complete)
        if held is None:
            raise DiskError(f"{copy.folder}: another process is copying this store; stage it when that one has ended")
        locks.append(held)
    return copies


def _refuse_too_small(comm: BytesComm, scratch: Path, copies: list[_Copy]) -> None:
    needed = sum(copy.missing() for copy in copies)
    keep = [copy.folder for copy in copies]

    def check() -> None:
        with disk.scratch_errors(scratch):
            free = disk.make_room(scratch, needed, keep)
        if free < needed:
            raise DiskError(
                f"{scratch} on {os.uname().nodename}: {needed:,} bytes are needed for the stores, {free:,} are free; "
                "free some, or stage slices instead (staging.mode: slice)"
            )

    together(comm, check)


def _stage(
    copy: _Copy, comm: BytesComm, copier: Copier, should_stop: Callable[[], bool], staged: Staged, shown: "_Shown"
) -> None:
    """One store, on every node; the marker last."""
    info = copy.info
    if not comm.any_true(not copy.complete):
        staged.kept += sum(shard.bytes for shard in info.shards)
        shown.add(sum(shard.bytes for shard in info.shards))
        return
    # While a shard is flushed to the disk, the next one is already being read.
    with ThreadPoolExecutor(1) as flushing:
        flushes: list[Future[None]] = []
        for shard in info.shards:
            part = _Shard(info, shard, copy, should_stop, shown)
            try:
                together(comm, part.open, should_stop)
                part.fetch_frame(comm, copier)
                together(comm, part.look, should_stop)
                part.fetch_tokens(comm, copier)
            except BaseException:
                part.close()
                raise
            together(comm, lambda: [flush.result() for flush in flushes])
            flushes.append(flushing.submit(part.finish))
            staged.copied += part.copied
            staged.kept += shard.bytes - part.copied
        together(comm, lambda: [flush.result() for flush in flushes])

    def mark() -> None:
        if not copy.complete:
            with disk.scratch_errors(copy.folder):
                fsync_path(copy.folder)
                write_json(copy.folder / STORE_FILE, info.as_json())

    together(comm, mark)


class _Shard:
    """One shard on its way to this node. A node that has the whole store already only helps the others to theirs."""

    def __init__(
        self, info: StoreInfo, shard: ShardInfo, copy: _Copy, should_stop: Callable[[], bool], shown: "_Shown"
    ) -> None:
        self._shard, self._source = shard, info.folder / shard.name
        self._path, self._final = copy.pending(shard), copy.folder / shard.name
        self._idle, self._should_stop, self._shown = copy.complete, should_stop, shown
        tokens_bytes = shard.tokens * np.dtype(info.dtype).itemsize
        end = shard.tokens_at + tokens_bytes
        self._tokens_bytes, self._blocks = tokens_bytes, -(-tokens_bytes // BLOCK)
        self._frame = [*pieces_of(0, shard.tokens_at), *pieces_of(end, shard.bytes)]
        self._tokens = pieces_of(shard.tokens_at, end)
        self._descriptor, self._digests = -1, b""
        self._frame_good = self._idle
        self._good = bytearray([self._idle] * len(self._tokens))
        self.copied = 0

    def open(self) -> None:
        """Opens the pending file, as long as it is to be; judges what it has of the frame."""
        if self._idle:
            return
        with disk.scratch_errors(self._path):
            if self._final.exists():  # finished, but the store was not: to be looked at like the rest
                os.replace(self._final, self._path)
            self._new = not self._path.exists()
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._descriptor, self._shard.bytes)
        self._frame_good = not self._new and self._is_frame_good()

    def fetch_frame(self, comm: BytesComm, copier: Copier) -> None:
        """Brings everything around the tokens, judged as a whole."""
        for turn in range(TRIES):
            if not comm.any_true(not self._frame_good):
                return
            copier.copy(self._source, self._frame, turn, self._take_frame)
            self._frame_good = together(comm, lambda: self._frame_good or self._is_frame_good())
        if comm.any_true(not self._frame_good):
            raise StoreError(f"{self._source}: damaged around its tokens; {REMEDY}")

    def look(self) -> None:
        """Judges the pieces of tokens that are there."""
        if self._idle:
            return
        with disk.scratch_errors(self._path):
            self._digests = os.pread(self._descriptor, 16 * self._blocks, self._shard.digests_at)
            buffer = memoryview(bytearray(PIECE))
            for number, piece in enumerate([] if self._new else self._tokens):
                if self._should_stop():
                    raise Stopped
                data = buffer[: os.preadv(self._descriptor, [buffer[: piece.size]], piece.start)]
                self._good[number] = len(data) == piece.size and self._bad_block(piece, data) is None
        self._shown.add(sum(piece.size for piece, good in zip(self._tokens, self._good, strict=True) if good))

    def fetch_tokens(self, comm: BytesComm, copier: Copier) -> None:
        """Brings the pieces of tokens that some node lacks."""
        for turn in range(TRIES):
            lacking = np.bitwise_or.reduce([1 - np.frombuffer(good, np.uint8) for good in comm.gather(self._good)])
            if not lacking.any():
                return
            copier.copy(self._source, [self._tokens[number] for number in np.flatnonzero(lacking)], turn, self._take)
        together(comm, self._refuse_bad)

    def finish(self) -> None:
        """Makes the shard durable, and gives it its name."""
        if self._idle:
            return
        try:
            with disk.scratch_errors(self._path):
                os.fsync(self._descriptor)
                os.replace(self._path, self._final)
        finally:
            self.close()

    def close(self) -> None:
        """Closes the pending file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _is_frame_good(self) -> bool:
        with disk.scratch_errors(self._path):
            return frame_digest(self._path, self._shard.tokens_at, self._tokens_bytes) == self._shard.digest

    def _take_frame(self, piece: Piece, data: memoryview) -> None:
        if not self._frame_good:
            write_at(self._descriptor, data, piece.start, self._path)
            self.copied += piece.size

    def _take(self, piece: Piece, data: memoryview) -> None:
        number = (piece.start - self._shard.tokens_at) // PIECE
        if self._good[number]:
            return
        if self._bad_block(piece, data) is None:
            write_at(self._descriptor, data, piece.start, self._path)
            self._good[number] = 1
            self.copied += piece.size
            self._shown.add(piece.size)

    def _bad_block(self, piece: Piece, data: memoryview) -> int | None:
        """The first block in a piece of tokens that is not as its digest says."""
        first = (piece.start - self._shard.tokens_at) // BLOCK
        for place in range(0, piece.size, BLOCK):
            block = first + place // BLOCK
            if xxhash.xxh3_128_digest(data[place : place + BLOCK]) != self._digests[16 * block : 16 * block + 16]:
                return block
        return None

    def _refuse_bad(self) -> None:
        for number, piece in enumerate(self._tokens):
            if not self._good[number]:
                data, block = memoryview(bytearray(piece.size)), None
                with contextlib.suppress(OSError), open(self._source, "rb") as file:
                    os.preadv(file.fileno(), [data], piece.start)
                    block = self._bad_block(piece, data)
                first = (piece.start - self._shard.tokens_at) // BLOCK
                raise damaged_block(self._source, first if block is None else block, self._blocks)


class _Shown:
    """Progress in bytes, over all stores."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self._on_progress, self._done, self._total = on_progress, 0, total

    def add(self, size: int) -> None:
        self._done += size
        if self._on_progress:
            self._on_progress("staging", self._done, self._total)


class StagedStore(TokenStore):
    """A store read from its copy on this node, as long as that serves; from then on, with a warning, from the original.

    Holds the copy's lock, so that nobody removes it.
    """

    def __init__(self, info: StoreInfo, shared: TokenStore, held: disk.Lock) -> None:
        super().__init__(info, shared._check)
        self._shared, self._held = shared, held
        self._failed = False

    @classmethod
    def find(cls, shared: TokenStore, scratch: Path) -> "StagedStore | None":
        """The copy of a store, if there is a whole one and nobody is at work on it. Raises DiskError."""
        folder = copy_folder(shared.info, scratch)
        if not (folder / STORE_FILE).exists():
            return None
        held = disk.lock(folder, exclusive=False)
        info = read_copy(shared.info, scratch)
        if held is None:
            return None
        if info is None:
            held.release()
            return None
        return cls(info, shared, held)

    def read(self, start: int, count: int) -> Tokens:
        if not self._failed:
            try:
                return super().read(start, count)
            except StoreError as error:
                self._failed = True
                log.warning("the copy on this node fails: %s; reading %s instead", error, self._shared.info.folder)
        return self._shared.read(start, count)
