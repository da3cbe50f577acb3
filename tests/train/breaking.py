"""What tests break inside a rank before its attempt begins: `prepare` functions for `rig.train`."""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crystal_hpc.train import checkpoint, distcp, generations, writing
from crystal_hpc.train.preemption import Stop


def only_one_rank_sees_damage(job: Any, victim: int) -> None:
    real = generations.find_damage

    def find(folder: Any, manifest: Any, names: Any = None, on_progress: Any = None) -> list[str]:
        return [f"{name} is damaged" for name in names] or real(folder, manifest, names, on_progress)

    if job.layout.comm.rank == victim:
        generations.find_damage = find


def without_memory(_job: Any) -> None:
    """There is none for the tensors of a checkpoint."""
    torch.load = lambda *_arguments, **_more: torch.empty(1 << 50)
    distcp.archive.find_numbers = lambda *_arguments: None


def without_storage(_job: Any, place: Path) -> None:
    """A file of a generation that has just been found to be whole can no longer be read."""

    def find(*_arguments: Any) -> list[str]:
        (place / "__0_0.distcp").unlink()
        (place / "__0_0.distcp").symlink_to("/proc/self/mem")  # at address 0: a real EIO
        return []

    generations.find_damage = find


def optimizer_does_nothing(job: Any) -> None:
    job.trainer.optimizer.step = lambda: (True, 0.0, 0)


def no_forecast(_job: Any) -> None:
    """The disk seems to have room for everything."""
    real = shutil.disk_usage
    checkpoint.shutil.disk_usage = lambda path: real(path)._replace(free=1 << 40)


def slow_copy(job: Any, seconds: float) -> None:
    """The copy of the state takes longer than a step; what `before_update` waits for goes to `RUN/waited`."""
    copying, waiting = checkpoint.CopyBuffer.like, writing.RankWriter.wait_until_copied

    def like(buffer: Any, parts: Any) -> Any:
        time.sleep(seconds)
        return copying(buffer, parts)

    def wait(writer: Any) -> None:
        began = time.monotonic()
        waiting(writer)
        with open(job.folder / "waited", "a") as file:
            file.write(f"{time.monotonic() - began}\n")

    checkpoint.CopyBuffer.like = like
    writing.RankWriter.wait_until_copied = wait


def slow_writing(_job: Any, seconds: float, part: float, then: Callable[[], object] = lambda: None) -> None:
    """The first writer pauses when it has written such a part of its bytes, and does something."""
    going_on, paused = writing.RankWriter._go_on, False

    def go_on(writer: Any) -> None:
        nonlocal paused
        if writer.written > part * writer.total and not paused:
            paused = True
            then()
            time.sleep(seconds)
        going_on(writer)

    writing.RankWriter._go_on = go_on


def sick_storage(_job: Any) -> None:
    """The first file of a save that is closed is not on disk: an error that says nothing of space or permission."""
    real, sick = distcp.FileWriter.close, True

    def close(writer: Any) -> Any:
        nonlocal sick
        if sick:
            sick = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(writer)

    distcp.FileWriter.close = close


def slow_completion(job: Any, number: int) -> None:
    """No generation is completed before the attempt's `number`-th step begins, or ten seconds have passed."""
    real, begun = distcp.write_index, threading.Event()

    def write_index(*arguments: Any) -> None:
        begun.wait(10)
        real(*arguments)

    distcp.write_index = write_index
    at_step(job, number, begun.set)


def fill(disk: Path, leave: int = 0) -> None:
    """Fills a small disk, but for so many bytes."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - leave)


def at_step(job: Any, number: int, action: Callable[[], object]) -> None:
    """Does something at the beginning of the attempt's `number`-th step."""
    beat, begun = job.beat, 0

    def listen(doing: str, step: bool = False) -> None:
        nonlocal begun
        beat(doing, step=step)
        begun += step
        if step and begun == number:
            action()

    job.beat = listen


def stop_in_step(job: Any, number: int, reason: str = "TIME_LIMIT") -> None:
    """Raises the flag at the beginning of the attempt's `number`-th step, as a signal would."""
    at_step(job, number, lambda: setattr(job.flag, "told", Stop[reason]))
