"""How any number of processes share the work of a build without talking to each other: by locks on files.

Under `data/build`. Each piece of work ends with a file under its final name, whoever made it, and the same work gives
the same bytes; so a lock only keeps two processes from doing the same thing at once. The kernel drops it when its
holder dies, by kill -9 too. Where a file system knows no locks, work is done twice, not wrongly.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from crystal_hpc.files import disk_errors

Item = TypeVar("Item")
SECONDS_BETWEEN_LOOKS = 0.2  # the first ones of a wait come sooner


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Holds the lock on a file for the length of the block; False if another process has it. Raises DiskError."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # this file system has no locks
        yield True
    finally:
        os.close(descriptor)


def share(
    items: Sequence[Item],
    name: Callable[[Item], str],
    is_done: Callable[[Item], bool],
    do: Callable[[Item], None],
    locks: Path,
    wait: Callable[[], None],
    rank: int = 0,
    size: int = 1,
) -> None:
    """Returns once every item is done, by this process or by another.

    Process `rank` of `size` begins at its own part of the list, so that they seldom meet. What another holds is looked
    at again until it is done, or taken over when its holder is gone. `wait` is called at every look and may raise.
    """
    begin = len(items) * rank // size
    left = [*items[begin:], *items[:begin]]
    pause = SECONDS_BETWEEN_LOOKS / 16
    while left:
        others = []
        for item in left:
            wait()
            if is_done(item):
                continue
            with claimed(locks / f"{name(item)}.lock") as mine:
                if not mine:
                    others.append(item)
                elif not is_done(item):  # again: it may have been done just before
                    do(item)
        left = others
        if left:
            time.sleep(pause)
            pause = min(2 * pause, SECONDS_BETWEEN_LOOKS)


def place_among_tasks(environ: Mapping[str, str]) -> tuple[int, int]:
    """This process's number and their count: ranks of mpiexec or srun, or the tasks of a Slurm array; else (0, 1)."""
    rank, tasks = 0, 1
    launchers = ("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    for number, count in (*launchers, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if environ.get(number) and environ.get(count):
            rank, tasks = int(environ[number]), int(environ[count])
            break
    elements = int(environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    element = int(environ.get("SLURM_ARRAY_TASK_ID", 0)) - int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
    step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
    return min(element // step, elements - 1) * tasks + rank, elements * tasks


def default_workers(place: tuple[int, int]) -> int:
    """Processes to start where nobody said: one a core that we may use, or one where others were started beside us."""
    return len(os.sched_getaffinity(0)) if place[1] == 1 else 1
