"""Processes that die as `kill -9` has it, in the very moment before one of their changes of the disk.

For whatever must be whole after any kill: call it, die at its first change, look; then at its second, and so on.
"""

import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

CHANGES_OF_THE_DISK = ("replace", "rename", "pwrite", "fsync", "mkdir", "unlink", "rmdir")


def die_at(moment: int) -> Callable[[], int]:
    """Has this process die at its `moment`-th change of the disk from now on; returns what counts them."""
    count = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    for name in CHANGES_OF_THE_DISK:
        setattr(os, name, deadly(getattr(os, name)))
    return lambda: count


def killed_at(moment: int, call: Callable[[], object]) -> bool:
    """Calls in a process of its own, which dies at its `moment`-th change of the disk: whether it came to that.

    Raises AssertionError where the call raised something.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads, of which the child needs none
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_at(moment)
            call()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) != 0
