"""What can befall a job on a cluster, done to it on purpose.

Each fault is a function of the job that runs; moments are chosen by `rounds`. All of them use what any user may do
(scancel, scontrol, srun into one's own job), but for a killed slurmd, which needs a cluster of one's own.
"""

import contextlib
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import slurm

Entry = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A running job, and what the journal knows of the attempt (nothing yet while it starts)."""

    job: str
    nodes: list[str]
    entry: Entry | None
    chance: random.Random
    urgent: str | None
    """A partition whose jobs preempt this one; None if the cluster has none."""
    devcluster: Path | None
    """Folder of the private cluster (slurm/devcluster), where its nodes may be killed."""


def _signal(name: str) -> Callable[[Target], None]:
    return lambda target: slurm.tell(target.job, name)


def _kill_one_rank(target: Target) -> None:
    _inside(target, "KILL", one=True)


def _hang_one_rank(target: Target) -> None:
    _inside(target, "STOP", one=True)


def _kill_all_ranks(target: Target) -> None:
    _inside(target, "KILL", one=False)


def _kill_batch_script(target: Target) -> None:
    slurm.command("scancel", "--batch", "--signal", "KILL", target.job)


def _cancel(target: Target) -> None:
    slurm.cancel([target.job])


def _requeue(target: Target) -> None:
    slurm.requeue(target.job)


def _preempt(target: Target) -> None:
    """A job that wants the same nodes whole, in a partition that comes first."""
    words = ["sbatch", "--parsable", "--partition", target.urgent or "", "--nodelist", ",".join(target.nodes)]
    words += ["--nodes", str(len(target.nodes)), "--exclusive", "--time", "1", "--output", "/dev/null"]
    slurm.command(*words, "--job-name", "drill-urgent", "--wrap", "sleep 2")


def _time_limit(target: Target) -> None:
    """Users may shorten a time limit: to one that is nearly over."""
    slurm.command("scontrol", "update", f"JobId={target.job}", "TimeLimit=1")


def lengthen(waiting: Iterable[str], seconds: float) -> None:
    """Gives waiting jobs the time back that `time-limit` took: a requeued one has its last limit, and runs into it."""
    for job in waiting:
        with contextlib.suppress(SlurmError):  # it has begun
            slurm.command("scontrol", "update", f"JobId={job}", f"TimeLimit={math.ceil(seconds / 60)}")


def _kill_slurmd(target: Target) -> None:
    assert target.devcluster is not None
    node = target.chance.choice(target.nodes)
    words = [sys.executable, str(_devcluster_program()), "--folder", str(target.devcluster), "node", node]
    subprocess.run([*words, "kill-with-tasks"], check=True)


def revive_nodes(devcluster: Path | None) -> None:
    """Starts slurmd again on nodes where a fault killed it."""
    if devcluster is None:
        return
    down = slurm.command("sinfo", "--noheader", "--Node", "--format", "%N %T").splitlines()
    for node in {line.split()[0] for line in down if line.split()[1].startswith("down")}:
        words = [sys.executable, str(_devcluster_program()), "--folder", str(devcluster), "node", node, "start"]
        subprocess.run(words, check=True)


FAULTS: dict[str, Callable[[Target], None]] = {
    "USR2": _signal("USR2"),
    "TERM": _signal("TERM"),
    "kill-rank": _kill_one_rank,
    "kill-all": _kill_all_ranks,
    "kill-batch": _kill_batch_script,
    "hang": _hang_one_rank,
    "scancel": _cancel,
    "requeue": _requeue,
    "preempt": _preempt,
    "time-limit": _time_limit,
    "slurmd": _kill_slurmd,
}
NEEDS_RANKS = {"kill-rank", "kill-all", "hang"}
"""Faults that need the ranks' process ids, which the journal has once they have met."""


SLOW = {"time-limit"}
"""Faults that Slurm acts on only every half minute: they need a phase that lasts longer."""


def possible(urgent: str | None, devcluster: Path | None) -> list[str]:
    """The faults that this cluster allows."""
    without = {"preempt"} if urgent is None else set()
    return [name for name in FAULTS if name not in without | ({"slurmd"} if devcluster is None else set())]


def preempting_partition(name: str | None) -> str | None:
    """A partition whose jobs preempt those of another, by priority tier."""
    if "partition_prio" not in slurm.configuration().get("PreemptType", ""):
        return None
    mine = slurm.partition(name)
    text = slurm.command("scontrol", "--oneliner", "show", "partition")
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if int(fields.get("PriorityTier", 0)) > int(mine.get("PriorityTier", 0)) and fields.get("State") == "UP":
            return fields["PartitionName"]
    return None


def _inside(target: Target, name: str, one: bool) -> None:
    """A signal to the process of one rank, or of each, from a step of our own inside its job."""
    assert target.entry is not None
    pids, nodes = target.entry["pids"], target.entry["nodes"]
    ranks = sorted(pids, key=int)
    job = slurm.job_fields(target.job).get("JobId", target.job)  # srun knows no 12_3
    for rank in [target.chance.choice(ranks)] if one else ranks:
        words = ["srun", "--overlap", "--jobid", job, "--nodes", "1", "--ntasks", "1"]
        words += ["--nodelist", nodes[int(rank)], "kill", f"-{name}", str(pids[rank])]
        try:
            slurm.command(*words)
        except SlurmError:
            if rank == ranks[0] or one:
                raise  # else the first rank's end has taken the others along


def _devcluster_program() -> Path:
    return Path(__file__).parents[2] / "slurm" / "devcluster" / "devcluster.py"
