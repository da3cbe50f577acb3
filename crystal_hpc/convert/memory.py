"""Whether this machine can hold the two models whose logits are compared; asked before hours of work, not after."""

import contextlib
import re
import resource
from pathlib import Path

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Model
from crystal_hpc.errors import CheckpointError

# One model at a time, in float32, and copies of a few of its tensors; and what Python, torch and Megatron take.
BYTES_A_PARAMETER = 5
OWN = 2 << 30
# A limit on address space also counts the file that Transformers maps, and what threads have only reserved.
MAPPED_BYTES_A_PARAMETER = 9
_CGROUP = Path("/sys/fs/cgroup")


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
    """Bytes of memory that this process may still take, as far as the kernel tells."""
    found = [int(match[1]) << 10] if (match := re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))) else []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(ValueError):
            found.append(int(_text(_CGROUP / limit)) - int(_text(_CGROUP / used)))
    return min(found, default=None)


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
