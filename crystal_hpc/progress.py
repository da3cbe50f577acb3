"""What commands and tools do alike: show that long work goes on, stop when told, say a mistake in one line.

Library functions take a callback `(what, done, total, note)` and know nothing of terminals; commands and tools get one
here.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from crystal_hpc.errors import CrystalError


class Progress(Protocol):
    """Told what is done, how much of it, how much there is in all, and a word on it (counts, rate, time left)."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None: ...


SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def shown_progress(quiet: bool = False) -> Iterator[Progress]:
    """A progress callback that prints to stderr; nothing with `quiet`, for all but one of many processes."""
    if quiet:
        yield lambda *_: None
        return
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        tasks = {}

        def show(what: str, done: int, total: int, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total, description=f"{what}: {note}" if note else what)

        yield show


def _plain_lines() -> Progress:
    last = time.monotonic()

    def show(what: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            said = f"{what}: {done / max(total, 1):.0%}" + (f", {note}" if note else "")
            print(said, file=sys.stderr, flush=True)

    return show


def run(main: Callable[[], int]) -> None:
    """Runs a tool and ends the process; a user's mistake is one line on stderr and exit code 2."""
    try:
        code = main()
    except CrystalError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


def stop_on_signals() -> Callable[[], bool]:
    """Makes Ctrl-C and SIGTERM set a flag, and returns the question whether it is set.

    Lets in one that was held back until now, as in the scripts of `slurm/`."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    return lambda: bool(signals)
