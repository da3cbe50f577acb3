"""crystal_hpc: multi-phase pretraining of language models on preemptible Slurm clusters, provable afterwards.

from crystal_hpc import load_run, load_cluster, submit

jobs = submit(load_run("run.yaml"), load_cluster("cluster.yaml"))
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_cluster", "load_run", "submit"]

_HOMES = {"load_run": "config.load", "load_cluster": "config.load", "submit": "jobs.submit"}


def __getattr__(name: str) -> Any:
    """Imports the three public functions when they are asked for: `crystal --help` must not wait for them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'crystal_hpc' has no attribute {name!r}")
    return getattr(import_module(f"crystal_hpc.{_HOMES[name]}"), name)
