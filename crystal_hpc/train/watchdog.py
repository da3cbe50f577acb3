"""A rank that no longer moves says where it stands, and leaves, so that the attempt ends and the next one begins.

Collectives wait for ever for a rank that hangs. Each rank therefore has a thread that looks whether the training loop
still gives signs of life (`beat`). The first sign missed for too long dumps the stacks of all threads to a file and
ends the process; since all ranks wait for the one that hangs, all of them do so within a moment, and each leaves its
stacks. faulthandler's own timer stands behind, for a rank that hangs inside C code and holds Python's lock.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

EXIT_CODE = 70
SHORTEST_PATIENCE = 60.0
STEPS = 20
"""A step may take so many times what the slowest one so far took."""
MOMENT = 5.0
"""Seconds for the other ranks to leave their stacks too, before the first to exit takes them along."""


class Watchdog:
    """Watches the thread that beats. `limit` (seconds) holds until a step has been timed, and is never exceeded."""

    def __init__(self, stacks: Path, limit: float, on_hang: Callable[[str], None]) -> None:
        self.limit = limit
        self._stacks = stacks
        self._on_hang = on_hang
        self._doing, self._doing_step = "starting", False
        self._last = time.monotonic()
        self._patience = limit
        self._slowest = 0.0
        self._over = threading.Event()
        # A descriptor of its own, opened now: a hung file system must not keep the stacks from being dumped.
        self._file = open(stacks, "w")  # noqa: SIM115 (closed by stop)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._arm()

    def beat(self, doing: str, step: bool = False) -> None:
        """A sign of life: what begins now. With `step`, it is a step like those before it, and measured as such."""
        now = time.monotonic()
        if step and self._doing_step:
            self._slowest = max(self._slowest, now - self._last)
        known = step and self._slowest > 0
        self._patience = min(self.limit, max(SHORTEST_PATIENCE, STEPS * self._slowest)) if known else self.limit
        self._doing, self._last, self._doing_step = doing, now, step
        self._arm()

    def stop(self) -> None:
        """Ends the watch; an empty file of stacks goes."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._stacks.exists() and self._stacks.stat().st_size == 0:
            self._stacks.unlink(missing_ok=True)

    def _arm(self) -> None:
        # Later than the thread, which says more.
        faulthandler.dump_traceback_later(self._patience + 3 * MOMENT, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            silent = time.monotonic() - self._last
            if silent < self._patience:
                continue
            faulthandler.dump_traceback(file=self._file, all_threads=True)
            self._on_hang(f"no sign of life for {silent:.0f} s while {self._doing}; stacks in {self._stacks.name}")
            time.sleep(MOMENT)
            os._exit(EXIT_CODE)
