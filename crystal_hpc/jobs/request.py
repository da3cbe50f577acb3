"""What is asked of the scheduler, as a plain dict for submitit: a function of run, cluster and link of the chain."""

import math
import re
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from crystal_hpc.config.schema import Cluster, Container, Run
from crystal_hpc.errors import ConfigError
from crystal_hpc.jobs.chain import Link

# From the exec of a rank on, signals wait until its handlers stand. Older coreutils cannot: there the first
# milliseconds of a rank stay open, and a job that dies in them is simply started again (`batch`).
SHIELD = """\
CRYSTAL_SHIELD='env --block-signal=TERM,USR2'
$CRYSTAL_SHIELD true 2>/dev/null || CRYSTAL_SHIELD=env"""
# The same for an image, whose coreutils may be others.
SHIELD_INSIDE = """\
shield="env --block-signal=TERM,USR2"; $shield true 2>/dev/null || shield=env; exec $shield "$@\""""
NOTHING_TO_DO = 75
STOPPED = 3  # how the copying of stores ends when it was told to leave


def local_parameters(cluster: Cluster) -> dict[str, Any]:
    """Parameters of submitit's local executor."""
    return {
        "nodes": 1,
        "tasks_per_node": cluster.ranks_per_node,
        "timeout_min": cluster.time_limit / 60,
        "signal_delay_s": cluster.signal_delay,
        "stderr_to_stdout": True,
    }


def slurm_parameters(
    run: Run, cluster: Cluster, folder: Path, link: Link, dependency: str | None, excluded: Collection[str] = ()
) -> dict[str, Any]:
    """Parameters of submitit's Slurm executor for one link; `excluded` nodes are added to the profile's.

    Raises ConfigError for a value that no line of #SBATCH can hold.
    """
    slurm = cluster.slurm
    side = {"stage": slurm.stage, "evaluate": slurm.evaluate}.get(link.kind)
    ranks = side.ranks if side else cluster.ranks_per_node
    wants_gpus = slurm.gpus and link.kind != "stage"
    options = {key.replace("_", "-"): value for key, value in slurm.options.items()}
    # What submitit has no parameter for; --requeue lets Slurm, too, bring the job back when a node is lost.
    options |= {"requeue": True, "kill-on-invalid-dep": "yes"}
    parameters: dict[str, Any] = {
        "job_name": f"{run.name}.{link.phase}" + (f".{link.kind}" if side else ""),
        "nodes": 1 if side else cluster.nodes,
        "ntasks_per_node": ranks,
        "time": math.ceil((side.time_limit if side else cluster.time_limit) / 60),
        "signal_delay_s": cluster.signal_delay,
        "partition": (side.partition if side else None) or slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": None if side and side.partition else slurm.constraint,  # other partitions have other nodes
        "exclude": ",".join(sorted({*slurm.exclude, *excluded})) or None,
        "gpus_per_node": ranks if wants_gpus else None,
        "cpus_per_task": slurm.cpus_per_rank,
        "mem": slurm.memory,
        "exclusive": slurm.exclusive or None,
        "dependency": dependency,
        "array_parallelism": 1,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": _setup(cluster, folder, link),
        "teardown": _teardown(folder, link),
        # One rank that fails takes the others with it at once; one that ends early, after two minutes.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=120", *_container_arguments(slurm.container)],
        "additional_parameters": _directives({k: v for k, v in options.items() if v is not False}, cluster),
    }
    given = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    return _directives(given, cluster)


def worker_parameters(name: str, cluster: Cluster, at_once: int) -> dict[str, Any]:
    """Parameters for an array of independent processes, one rank (and GPU) each, that belong to no run's chain.

    Raises ConfigError for a value that no line of #SBATCH can hold.
    """
    slurm = cluster.slurm
    options = {key.replace("_", "-"): value for key, value in slurm.options.items() if value is not False}
    parameters: dict[str, Any] = {
        "job_name": name,
        "nodes": 1,
        "ntasks_per_node": 1,
        "time": math.ceil(cluster.time_limit / 60),
        "signal_delay_s": cluster.signal_delay,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": ",".join(slurm.exclude) or None,
        "gpus_per_node": 1 if slurm.gpus else None,
        "cpus_per_task": slurm.cpus_per_rank,
        "mem": None if slurm.memory == "0" else slurm.memory,  # a whole node is more than one rank's
        "array_parallelism": at_once,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": _environment(cluster),
        "srun_args": _container_arguments(slurm.container),
        "additional_parameters": _directives({"requeue": True, **options}, cluster),
    }
    given = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    return _directives(given, cluster)


def python_command(cluster: Cluster) -> str:
    """How a rank's Python is started: shell words, signals held back, inside the container if there is one."""
    container = cluster.slurm.container
    if container is None:
        return f"$CRYSTAL_SHIELD {shlex.quote(sys.executable)}"
    inside = f"sh -c {shlex.quote(SHIELD_INSIDE)} rank {shlex.quote(container.python)}"
    if container.runtime == "pyxis":
        return inside
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    gpu = ["--nv"] if cluster.slurm.gpus else []
    return f"{shlex.join(['apptainer', 'exec', *gpu, *binds, container.image])} {inside}"


def batch_command(word: str, folder: Path, link: Link) -> str:
    """The command of the batch script before (`begin`) and after (`end`) the ranks."""
    words = [sys.executable, "-m", "crystal_hpc.jobs.batch", word, str(folder), "--kind", link.kind]
    return shlex.join([*words, "--phase", link.phase])


def _setup(cluster: Cluster, folder: Path, link: Link) -> list[str]:
    return [
        "# signals are for the ranks: this script lives on, and decides how the job does",
        "trap : TERM USR2",
        *_environment(cluster),
        batch_command("begin", folder, link),
        f"case $? in 0) ;; {NOTHING_TO_DO}) exit 0 ;; *) exit 1 ;; esac",
        *_copying(cluster, folder, link),
    ]


def _environment(cluster: Cluster) -> list[str]:
    """What the profile sets up before anything of ours runs."""
    slurm = cluster.slurm
    variables = {**slurm.network, **cluster.environment}
    if slurm.cpus_per_rank:
        variables["SRUN_CPUS_PER_TASK"] = str(slurm.cpus_per_rank)  # srun no longer takes it over from sbatch
    return [
        *(f"module load {shlex.quote(module)}" for module in slurm.modules),
        *slurm.setup,
        *(["set +e"] if slurm.setup else []),  # what comes after looks at exit codes itself
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())),
        *([f"export CRYSTAL_SCRATCH={_expanded(slurm.scratch)}"] if slurm.scratch else []),
        SHIELD,
    ]


def _copying(cluster: Cluster, folder: Path, link: Link) -> list[str]:
    """Before the ranks, one task a node copies the stores. A failure of it is a warning, its being told to leave is the
    end of this start: the ranks would not hear of it any more."""
    staging = cluster.staging
    if staging is None or staging.mode != "whole" or link.kind != "train":
        return []
    logs = shlex.quote(str(folder / "logs")) + '/"$SLURM_JOB_ID"_copy'
    words = ['srun --unbuffered --mpi="$CRYSTAL_MPI"', f"--nodes={cluster.nodes} --ntasks={cluster.nodes}"]
    words += [f"--ntasks-per-node=1 --output {logs}_%t.out --open-mode=append --kill-on-bad-exit=1"]
    words += [shlex.join(_container_arguments(cluster.slurm.container))] if cluster.slurm.container else []
    words += [python_command(cluster), f"-u -m crystal_hpc.jobs.rank {shlex.quote(str(folder))} --copy {link.phase}"]
    words += [f"2>>{logs}_srun.out"]  # what srun says of this step is not of the ranks: `batch` reads that
    return [
        f"CRYSTAL_MPI={staging.mpi}; srun --mpi=list 2>&1 | grep -qw {staging.mpi} || CRYSTAL_MPI=none",
        " ".join(word for word in words if word),
        f"case $? in 0) ;; {STOPPED}) trap '' TERM USR2",
        f"    {batch_command('end', folder, link)} --status 0; exit ;;",
        "*) echo 'warning: the stores were not staged, see logs/*_copy_*.out: shared storage is read' >&2 ;; esac",
    ]


def _directives(options: dict[str, Any], cluster: Cluster) -> dict[str, Any]:
    """Options for lines of #SBATCH. submitit quotes values as for a shell; but a line's end would leave the comment
    and begin a command, and sbatch, unlike a shell, reads \\ between quotes as an escape."""
    for name, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise ConfigError(f"slurm.options: {name!r} is no long option of sbatch", f"cluster {cluster.name}")
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f]", value):
            raise ConfigError(f"slurm: {name}: {value!r} has a control character in it", f"cluster {cluster.name}")
    return {name: value.replace("\\", "\\\\") if isinstance(value, str) else value for name, value in options.items()}


def _expanded(path: str) -> str:
    """A shell word in which $NAME and ${NAME} stand for their values, and all else for itself."""
    parts = re.findall(r"(\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})|([^$]+|\$)", path, re.ASCII)
    return "".join(f'"{variable}"' if variable else shlex.quote(literal) for variable, literal in parts)


def _teardown(folder: Path, link: Link) -> list[str]:
    return [
        "CRYSTAL_STATUS=$?",
        "trap '' TERM USR2",
        f'{batch_command("end", folder, link)} --status "$CRYSTAL_STATUS"',
    ]


def _container_arguments(container: Container | None) -> list[str]:
    if container is None or container.runtime != "pyxis":
        return []
    mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts)
    return [f"--container-image={container.image}", *([f"--container-mounts={mounts}"] if mounts else [])]
