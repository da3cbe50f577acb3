"""Whether this machine can hold the two models whose logits are compared; asked before hours of work, not after."""

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Model
from crystal_hpc.errors import CheckpointError

# One model at a time, in float32, and copies of a few of its tensors; and what Python, torch and Megatron take.
BYTES_A_PARAMETER = 5
OWN = 2 << 30
# A limit on address space also counts the file that Transformers maps, and what threads have only reserved.
MAPPED_BYTES_A_PARAMETER = 9
_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def check_room_for_logits(model: Model) -> None:
    """Raises CheckpointError where memory, or a limit on it, is too small to compute logits."""
    parameters = derive.parameters(model)
    for what, there, a_parameter in (
        ("memory", available(), BYTES_A_PARAMETER),
        ("address space (ulimit -v)", address_space(), MAPPED_BYTES_A_PARAMETER),
    ):
        needed = parameters * a_parameter + OWN
        if there is not None and there < needed:
            raise CheckpointError(
                f"comparing logits takes about {needed / 1e9:.1f} GB of {what}, and {there / 1e9:.1f} GB are free; "
                "choose a larger machine, or check the weights alone (--verify weights)"
            )


def available() -> int | None:
    """Bytes of memory that this process may still take, as far as the kernel tells: of the machine, and of its job."""
    found = [int(match[1]) << 10] if (match := re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))) else []
    for folder, limit, used in _cgroups():
        with contextlib.suppress(ValueError):
            found.append(int(_text(folder / limit)) - int(_text(folder / used)) + _cache(folder))
    return min(found, default=None)


def _cgroups() -> Iterator[tuple[Path, str, str]]:
    """Folders of the control groups that may limit memory, from our own to the root, and their files: limit, use."""
    for line in _text(_OWN_CGROUP).splitlines():
        controllers, path = line.split(":", 2)[1:]
        if controllers == "":
            root, names = _CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, *names
            if folder == root:
                break


def _cache(folder: Path) -> int:
    """Bytes of files that count as used and that the kernel gives back when memory runs short."""
    said = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines())
    return sum(int(said.get(f"total_{kind}", said.get(kind, 0))) for kind in ("inactive_file", "active_file"))


def address_space() -> int | None:
    """Bytes of address space left under RLIMIT_AS; None without one."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    match = re.search(r"VmSize:\s*(\d+) kB", _text("/proc/self/status"))
    return limit - (int(match[1]) << 10 if match else 0)


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
