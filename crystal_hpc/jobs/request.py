"""What is asked of the scheduler, as a plain dict: a pure function of run and cluster."""

from typing import Any

from crystal_hpc.config.schema import Cluster


def executor_parameters(cluster: Cluster) -> dict[str, Any]:
    """Parameters of submitit's executor."""
    return {
        "nodes": 1,
        "tasks_per_node": cluster.ranks,
        "timeout_min": cluster.time_limit / 60,
        "signal_delay_s": cluster.signal_delay,
        "stderr_to_stdout": True,
    }
