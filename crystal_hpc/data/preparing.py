"""Slices of the next steps, prepared beside the training by a process of its own; `PreparedRows` is the trainer's side.

The helper imports no torch, runs at low priority, takes no signals (those are for the trainer, which will leave) and
ends when the pipe from the trainer does. It is told the number of the slice to make next, makes it, and says nothing:
the trainer looks for the file when it comes to those steps. All that goes wrong here is one line in the log.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from crystal_hpc.config.schema import Run
from crystal_hpc.data import scratch as disk
from crystal_hpc.data.rows import Rows
from crystal_hpc.data.slices import Cut, SliceFile, hold, make_cut, open_reading, passed, remove_unfinished, write_slice
from crystal_hpc.data.sources import Sources, read_sources
from crystal_hpc.errors import CrystalError, StoreError
from crystal_hpc.log import log, setup_logging

OURS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class PreparedRows:
    """Rows of steps from slices, where there are good ones; asks for the next slice as each one is begun."""

    def __init__(self, cut: Cut, scratch: Path, helper: "Helper | None" = None) -> None:
        """With a helper, this is the process that has slices made and deletes those that are passed."""
        self._cut, self._scratch, self._helper = cut, scratch, helper
        self._span = -1
        self._file: SliceFile | None = None
        self._failed = False
        self.served = 0
        """Steps read from slices."""
        self._lock = self._join()

    def _join(self) -> disk.Lock | None:
        try:
            if self._helper is not None:
                disk.clean(self._scratch, [self._cut.folder(self._scratch)])
                remove_unfinished(self._cut, self._scratch)
            return hold(self._cut, self._scratch)
        except (CrystalError, OSError) as error:
            self._give_up(error)
            return None

    def read(self, step: int) -> Rows | None:
        """The rows of a step, or None: then they are to be read from shared storage."""
        if self._failed:
            return None
        try:
            if step // self._cut.span != self._span:
                self._enter(step // self._cut.span)
            if self._file is None:
                self._open()
            if self._file is None:
                return None
            rows = self._file.read(step)
        except (CrystalError, OSError) as error:
            self._give_up(error)
            return None
        self.served += 1
        return rows

    def close(self) -> None:
        """Ends the helper; slices stay for a later attempt, unless the phase is through."""
        self._close_file()
        log.info("%d steps of phase %s were read from slices", self.served, self._cut.phase)
        if self._helper is not None:
            self._helper.stop()
            if (self._span + 1) * self._cut.span >= self._cut.steps:
                for path in passed(self._cut, self._scratch, self._cut.steps):
                    with contextlib.suppress(OSError):
                        path.unlink()
        if self._lock is not None:
            self._lock.release()

    def _enter(self, span: int) -> None:
        self._close_file()
        self._span = span
        if self._helper is not None:
            for path in passed(self._cut, self._scratch, (span - 1) * self._cut.span):
                path.unlink(missing_ok=True)  # the slice just left stays: another rank may not have left it yet
            if (span + 1) * self._cut.span < self._cut.steps:
                self._helper.ask(span + 1)

    def _open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._file = SliceFile(self._cut, self._scratch, *self._cut.bounds(self._span))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self._close_file()
        log.warning("slices fail on this node: %s; reading shared storage instead", error)
        if isinstance(error, StoreError):
            with contextlib.suppress(OSError):
                self._cut.path(self._scratch, *self._cut.bounds(self._span)).unlink(missing_ok=True)
        if self._helper is not None:
            self._helper.stop()


class Helper:
    """The process that makes the slices, seen from the trainer."""

    def __init__(self, run_file: Path, phase: int, cut: Cut, scratch: Path) -> None:
        words = [run_file, phase, cut.share.data_rank, cut.share.data_size, cut.span, scratch]
        # It begins with the signals blocked, and ignores them as soon as it can.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crystal_hpc.data.preparing", *map(str, words)], stdin=subprocess.PIPE
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ask(self, number: int) -> None:
        """Has a slice made; one that is in the making is given up for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, and said why
            self._process.stdin.write(f"{number}\n".encode())
            self._process.stdin.flush()

    def stop(self) -> None:
        """Ends it, at the latest after a moment."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Orders:
    """The numbers that the trainer writes into the pipe; only the newest counts."""

    def __init__(self) -> None:
        self._text, self.over = b"", False

    def next(self) -> int | None:
        """Waits for the next number; None at the end."""
        while b"\n" not in self._text and not self.over:
            self._take()
        *lines, self._text = self._text.split(b"\n")
        return int(lines[-1]) if lines and not self.over else None

    def waiting(self) -> bool:
        """Whether there is something new, the end of the trainer too."""
        if select.select([0], [], [], 0)[0]:
            self._take()
        return self.over or b"\n" in self._text

    def _take(self) -> None:
        found = os.read(0, 1024)
        self._text, self.over = self._text + found, not found


def serve(run: Run, sources: Sources, phase: int, cut: Cut, scratch: Path) -> None:
    """Makes slices as they are asked for, until the trainer is gone. Raises CrystalError."""
    orders, reading, held = _Orders(), open_reading(run, sources, phase), hold(cut, scratch)
    while (number := orders.next()) is not None:
        first, stop = cut.bounds(number)
        if not cut.path(scratch, first, stop).exists():
            write_slice(cut, scratch, first, stop, reading, lambda _: not orders.waiting())
    held.release()


def main() -> int:
    """The helper: run file, phase, data rank, data size, span and scratch folder are its words."""
    for number in OURS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    setup_logging(int(sys.argv[3]), "slices")
    from crystal_hpc.config.load import load_run

    phase, rank, size, span = (int(word) for word in sys.argv[2:6])
    scratch = Path(sys.argv[6])
    try:
        run = load_run(Path(sys.argv[1]))
        sources = read_sources(run)
        serve(run, sources, phase, make_cut(run, sources, phase, rank, size, span), scratch)
    except CrystalError as error:
        log.warning("no more slices from this node: %s; reading shared storage instead", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
