"""Signals: a handler that sets a flag, and nothing more.

Slurm preempts or cancels with SIGTERM, and announces the end of the time limit with SIGUSR2 (`--signal`). Both only
mark the flag; the training loop reads it in every long stretch, the ranks agree at a step boundary, and then all of
them save together (`loop`). A job is started with both signals held back, so that one that comes while Python is still
importing, when SIGUSR2 would kill it and submitit would throw SIGTERM away, waits: `watch` lets them in once the
handlers stand.
"""

import contextlib
import enum
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Stop(enum.IntEnum):
    """Why a job was told to stop; the larger one wins when ranks or signals differ."""

    NO = 0
    TIME_LIMIT = 1
    """Time is nearly up: save, and go on in a requeue or in the next slice."""
    PREEMPTED = 2
    """Preempted or cancelled: save and leave; requeueing is the scheduler's business."""


SIGNALS = {signal.SIGUSR2: Stop.TIME_LIMIT, signal.SIGTERM: Stop.PREEMPTED}


class StopFlag:
    """What this rank was told, and when."""

    def __init__(self) -> None:
        self.told = Stop.NO
        self.signal: str | None = None
        self.time: float | None = None
        self.deadline: float | None = None
        """When (Unix time) to stop though no signal has come: one can be lost before the ranks exist."""

    @property
    def stop(self) -> Stop:
        """Why to stop, as things stand now."""
        if self.told is Stop.NO and self.deadline is not None and time.time() > self.deadline:
            self.told, self.signal, self.time = Stop.TIME_LIMIT, "deadline", time.time()
        return self.told

    def set(self, number: int, _frame: FrameType | None = None) -> None:
        """The signal handler."""
        if self.time is None:
            self.time = time.time()
        told = SIGNALS[signal.Signals(number)]
        if told > self.told:
            self.told, self.signal = told, signal.Signals(number).name


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """What is started in this block, and all that it starts, has the signals blocked: processes until they `watch`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def watch() -> StopFlag:
    """Installs the handlers and lets in any signal that came before; call from the main thread."""
    flag = StopFlag()
    for number in SIGNALS:
        signal.signal(number, flag.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return flag


def start_thread(name: str, work: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Begins work that signals do not reach, and that no process waits for at its end."""
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
    with held_back():  # the thread inherits it
        thread.start()
    return thread
