"""Where a rank stands: job, launch, rank, node and device, read from the scheduler's own variables.

Slurm's for a task of srun; submitit's for a process of its local executor. Nothing else in the package reads them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from crystal_hpc.errors import RunError


@dataclass(frozen=True)
class Place:
    """One rank of one start of a job."""

    executor: Literal["local", "slurm"]
    job: str
    """The job's id as people write it: `12`, `12_3` for element 3 of array 12."""
    launch: int
    """How often the job has been requeued before this start."""
    rank: int
    ranks: int
    local_rank: int
    """Among the ranks of this node."""
    node: str | None
    """The scheduler's name of this node."""
    address: str
    """Where other ranks reach rank 0, if this is rank 0."""

    @property
    def start(self) -> str:
        """Names this start of the job among all."""
        return f"{self.job}.{self.launch}"


def job_of(environ: Mapping[str, str]) -> tuple[str, int]:
    """Id of the Slurm job that the process belongs to, as people write it, and how often it was requeued."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]
    return job, int(environ.get("SLURM_RESTART_COUNT", 0))


def my_place(environ: Mapping[str, str] | None = None, launch: int = 0) -> Place:
    """This process's place; submitit counts `launch` itself for local jobs. Raises RunError outside of a job."""
    env = os.environ if environ is None else environ
    # First: a local job may well run inside an allocation of Slurm's, and sees its variables.
    if env.get("SUBMITIT_EXECUTOR") == "local":
        rank, ranks = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
        return Place("local", env["SUBMITIT_LOCAL_JOB_ID"], launch, rank, ranks, rank, None, "127.0.0.1")
    if "SLURM_PROCID" not in env:
        raise RunError("this process is no rank of a job; start runs with: crystal submit")
    job, launch = job_of(env)
    rank, ranks = int(env["SLURM_PROCID"]), int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
    node = env.get("SLURMD_NODENAME")
    # srun runs on the first node of a batch job, and so does rank 0: its address as the nodes see it.
    address = env.get("SLURM_LAUNCH_NODE_IPADDR") if env.get("SLURM_NODEID", "0") == "0" else None
    return Place("slurm", job, launch, rank, ranks, int(env.get("SLURM_LOCALID", 0)), node, address or node or "")
