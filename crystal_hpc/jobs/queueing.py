"""A prepared run's chain into Slurm's queue: looked at first, queued link by link, and taken back whole if one fails.

`submit` calls this for `executor: slurm`; what the scripts do once they run is in `batch`.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.errors import ConfigError, RunError, SlurmError
from crystal_hpc.jobs import chain, journal, slurm, submitted
from crystal_hpc.jobs.chain import Link
from crystal_hpc.jobs.request import python_command, slurm_parameters
from crystal_hpc.jobs.verdict import nodes_to_exclude

DEFAULT_MAX_ARRAY = 1001  # Slurm's, for a dry run where there is none


def check_path(folder: Path) -> None:
    """Raises RunError for a run folder whose path Slurm would read as something else."""
    if not str(folder).isprintable() or "%" in str(folder) or "\\" in str(folder):
        raise RunError(f"{str(folder)!r}: Slurm replaces %, \\ and control characters in paths; choose another folder")


def start_chain(folder: Path, cluster: Cluster) -> list[Any]:
    """Queues what is left of a run; returns submitit's jobs in order. Raises SlurmError, the queue as it was before."""
    from crystal_hpc.jobs.executor import Executor

    if not slurm.is_there():
        raise SlurmError("sbatch: not found; submit from a login node, or try --dry-run or executor: local")
    run = load_run(folder / "run.yaml")
    links = make_links(folder, run, cluster, most_elements(slurm.configuration()))
    refuse_short_time(folder, cluster)
    _try_all(folder, run, cluster, links)
    excluded = nodes_to_exclude(journal.read_attempts(folder))
    ids: list[str] = []
    jobs: list[Any] = []
    try:
        for link in links:
            dependency = ",".join(f"{kind}:{ids[index]}" for kind, index in link.after) or None
            parameters = slurm_parameters(run, cluster, folder, link, dependency, excluded)
            queued = Executor(folder / "logs", python_command(cluster), parameters).submit_slices(
                make_task(folder, link), link.slices
            )
            ids.append(queued[0].job_id.partition("_")[0])
            jobs += queued
            about = {"kind": link.kind, "phase": link.phase, "slices": link.slices, "dependency": dependency}
            submitted.add_job(folder, {"id": ids[-1], **about})
    except BaseException as failure:
        try:
            slurm.cancel(ids)
        except SlurmError as error:
            named = ", ".join(ids)
            raise SlurmError(
                f"{failure}; jobs {named} could not be taken back ({error}): crystal cancel {folder}"
            ) from failure
        raise
    return jobs


def scripts(folder: Path, run: Run, cluster: Cluster) -> Iterator[tuple[Link, str]]:
    """The exact batch scripts of what is left of the chain; ids that only Slurm can give are shown as <phase>."""
    from crystal_hpc.jobs.executor import Executor

    most = DEFAULT_MAX_ARRAY
    with contextlib.suppress(SlurmError):
        most = most_elements(slurm.configuration(timeout=5))
    links = make_links(folder, run, cluster, most)
    excluded = nodes_to_exclude(journal.read_attempts(folder))
    for link in links:
        named = [f"{kind}:<{links[index].kind} {links[index].phase}>" for kind, index in link.after]
        parameters = slurm_parameters(run, cluster, folder, link, ",".join(named) or None, excluded)
        executor = Executor(folder / "logs", python_command(cluster), parameters)
        yield link, executor.script(link.slices)


def most_elements(configuration: dict[str, str]) -> int:
    """How many elements an array may have on this cluster."""
    limits = [int(configuration.get("MaxArraySize", DEFAULT_MAX_ARRAY))]
    limits += [
        int(found) for found in re.findall(r"max_array_tasks=(\d+)", configuration.get("SchedulerParameters", ""))
    ]
    return min(limits)


def make_links(folder: Path, run: Run, cluster: Cluster, most_elements: int) -> list[Link]:
    """What of the chain is left. Raises ConfigError for slices on a cluster without arrays."""
    if cluster.slurm.resume_by == "slices" and most_elements < 1:
        raise ConfigError("slurm.resume_by: slices, but the cluster allows no arrays (MaxArraySize=0); use requeue", "")
    return chain.make_chain(run, cluster, chain.done_links(folder, run, cluster), most_elements)


def make_task(folder: Path, link: Link) -> Any:
    """What the ranks of a link run."""
    from crystal_hpc.jobs.side import EvaluateTask, StageTask
    from crystal_hpc.jobs.task import TrainTask

    kinds = {"train": TrainTask, "stage": StageTask, "evaluate": EvaluateTask}
    return kinds[link.kind](folder, link.phase)


def slowest_save(folder: Path) -> float:
    """Seconds from a signal to the durable checkpoint, the longest that this run has seen; 0 if it has seen none."""
    seen = [entry["signal_to_durable"] or 0.0 for entry in journal.read_attempts(folder)]
    for manifest in folder.glob("checkpoints/*/*/manifest.json"):
        with contextlib.suppress(ValueError, KeyError, OSError):
            seen.append(files.read_json(manifest)["seconds"])
    return max(seen, default=0.0)


def refuse_short_time(folder: Path, cluster: Cluster) -> None:
    """Raises ConfigError if an attempt would have to save before it could train."""
    save = slowest_save(folder)
    if cluster.signal_delay + save >= cluster.time_limit:
        raise ConfigError(
            f"time_limit: {cluster.time_limit}s is not longer than signal_delay ({cluster.signal_delay}s) and a save "
            f"({save:.0f} s, as measured); give it more",
            f"cluster {cluster.name}",
        )


def warnings(folder: Path, cluster: Cluster) -> list[str]:
    """Where the time that a save was measured to take does not fit what Slurm gives; empty before the first save."""
    save = slowest_save(folder)
    if not save:
        return []
    limits, partition = slurm.configuration(), slurm.partition(cluster.slurm.partition)
    grace, kill_wait = (
        slurm.seconds(partition.get("GraceTime", "")) or 0,
        slurm.seconds(limits.get("KillWait", "")) or 0,
    )
    told = f"from signal to durable checkpoint this run has needed up to {save:.0f} s"
    found = []
    if save > cluster.signal_delay:
        found.append(
            f"{told}, more than signal_delay: {cluster.signal_delay}s; raise it, or each time limit loses work"
        )
    if partition.get("PreemptMode", "OFF") != "OFF" and save > grace + kill_wait:
        name = partition.get("PartitionName", "?")
        found.append(
            f"{told}, more than partition {name} gives on preemption (GraceTime {grace} s + KillWait {kill_wait} s)"
        )
    return found


def _try_all(folder: Path, run: Run, cluster: Cluster, links: list[Link]) -> None:
    """Has Slurm look at each kind of script before any is queued, so that a chain is never left half-made."""
    from crystal_hpc.jobs.executor import Executor

    seen = set()
    for link in links:
        if link.kind in seen:
            continue
        seen.add(link.kind)
        parameters = slurm_parameters(run, cluster, folder, link, None)
        text = Executor(folder / "logs", python_command(cluster), parameters).script()
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
            script.write(text)
            script.flush()
            slurm.try_script(Path(script.name))
