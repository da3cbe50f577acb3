"""Processes, ports and /proc, as the private cluster needs them. Processes are known by their ids, never by name."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import time
from pathlib import Path


def die_with_parent() -> None:
    """For a child to call before its exec: SIGKILL when its parent ends, whatever ends it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_ports(count: int) -> list[int]:
    """Ports below the range from which the system lends its own."""
    found: list[int] = []
    # At random: clusters that start at the same moment must not all find the same ones free.
    for port in random.sample(range(17000, 32000), 1000):
        if len(found) == count:
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def is_listening(port: int) -> bool:
    """Whether something answers on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def all_processes() -> list[int]:
    """Ids of all processes."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def words_of(pid: int) -> list[str]:
    """The command line of a process; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    return []


def variable_of(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"):
            if line.startswith(f"{name}="):
                return line.partition("=")[2]
    return None


def _status(pid: int) -> list[str]:
    """State and parent of a process, as /proc tells them."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    return []


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    return _status(pid)[:1] in ([], ["Z"])


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it is gone."""
    status = _status(pid)
    return int(status[1]) if status else 0


def end(pid: int, number: signal.Signals) -> None:
    """Ends a process by its id; SIGKILL if it has not gone after ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        deadline = time.monotonic() + 10
        while not is_gone(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
