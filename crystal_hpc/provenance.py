"""Which code and which packages did something: recorded with every attempt and every checkpoint."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("crystal-hpc", "torch", "megatron-core", "transformer-engine", "numpy", "h5py", "submitit", "tokenizers")


@functools.cache
def commit() -> str | None:
    """The git commit of the package, marked `+` if the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = _git(here, "rev-parse", "--short=12", "HEAD")
        return found + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
