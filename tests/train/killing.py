"""Ends this process as `kill -9` does, at a chosen line of the code that saves, or at a point that has a name.

These are `prepare` functions for `rig.train`: they take the job, what they need to know, and the rank that is to die.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from crystal_hpc import files
from crystal_hpc.train import checkpoint, distcp, writing
from crystal_hpc.train.manifest import MANIFEST, Manifest

SAVING = {module.__file__ for module in (checkpoint, distcp, writing, files)}


def die(*_arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_line(job: Any, moment: int, rank: int) -> None:
    """Dies at the `moment`-th line that the attempt's first save executes, in whichever thread.

    Leaves the number of lines until the first save is durable in `RUN/lines`.
    """
    if job.layout.comm.rank != rank:
        return
    count, begun, tell = 0, False, job.on_event

    def line(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == moment:
                die()
        return line

    def call(frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal begun
        if frame.f_code.co_filename not in SAVING:
            return None
        begun = begun or frame.f_code.co_name == "_start"
        return line if begun else None

    def on_event(event: str, position: Any) -> None:
        tell(event, position)
        if event == "saved" and not (job.folder / "lines").exists():
            (job.folder / "lines").write_text(str(count))

    job.on_event = on_event
    threading.settrace(call)
    sys.settrace(call)


def die_at_point(job: Any, point: str, rank: int) -> None:
    """Dies in the attempt's first save, at one of `POINTS`."""
    if job.layout.comm.rank == rank:
        POINTS[point]()


def _before(holder: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    real = getattr(holder, name)

    def call(*arguments: Any, **more: Any) -> Any:
        if when(*arguments):
            die()
        return real(*arguments, **more)

    setattr(holder, name, call)


def _after(holder: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    real = getattr(holder, name)

    def call(*arguments: Any, **more: Any) -> Any:
        result = real(*arguments, **more)
        if when(*arguments):
            die()
        return result

    setattr(holder, name, call)


def _in_a_chunk() -> None:
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if len(data) > 4096:
            real(descriptor, data[: len(data) // 2])
            die()
        return real(descriptor, data)

    os.write = write


def _of_folder(source: Any, _target: Any) -> bool:
    return str(source).endswith(files.PENDING) and os.path.isdir(source)


def _of_manifest(_source: Any, target: Any) -> bool:
    return os.path.basename(target) == MANIFEST


def _renamed(_source: Any, target: Any) -> bool:
    return os.path.basename(str(target)).startswith("step_")


def _between_chunks(number: int) -> Callable[[], None]:
    def install() -> None:
        passed = iter(range(number))
        _before(writing.RankWriter, "_go_on", lambda _writer: next(passed, None) is None)

    return install


OF_ANY_RANK: dict[str, Callable[[], None]] = {
    "while copying": _between_chunks(3),  # a save that does not copy dies between its first chunks
    "between chunks": _between_chunks(20),
    "in the middle of a chunk": _in_a_chunk,
    "before a file is forced to the disk": lambda: _before(os, "fsync"),
    "after a file is complete": lambda: _after(distcp.FileWriter, "close"),
}
OF_RANK_0: dict[str, Callable[[], None]] = {
    "between files": lambda: _before(distcp, "write_index"),
    "after the index": lambda: _after(distcp, "write_index"),
    "before the manifest": lambda: _before(Manifest, "write"),
    "before the manifest is renamed": lambda: _before(os, "replace", _of_manifest),
    "after the manifest": lambda: _after(Manifest, "write"),
    "before the rename": lambda: _before(os, "rename", _of_folder),
    "after the rename": lambda: _after(os, "rename", _renamed),
}
POINTS = OF_ANY_RANK | OF_RANK_0
