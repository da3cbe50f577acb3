"""Slurm, asked through its own commands: the queue, a job, the configuration; and the few things told to it.

Everything that talks to a cluster goes through here. Accounting (sacct) is used where it answers and needed nowhere.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from crystal_hpc.errors import SlurmError

# Slurm's job states: every one it documents is in one of these three.
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
AT_WORK = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
)
OVER = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    }
)  # fmt: skip


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue: a job, or one element of an array."""

    job: str
    """As people write it: `12`, or `12_3` for an element of array 12."""
    state: str
    reason: str
    nodes: str
    start: str
    """When it started, or is expected to; `N/A` where Slurm has no idea."""

    @property
    def array(self) -> str:
        """The id that sbatch gave: of the whole array, where it is one."""
        return self.job.partition("_")[0]


def is_there() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def command(*words: str, timeout: float = 60) -> str:
    """Runs one of Slurm's commands and returns what it printed; raises SlurmError with Slurm's own message."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except OSError as error:
        said = "not found on PATH" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
        raise SlurmError(f"{words[0]}: {said}; is this machine part of a Slurm cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]}: no answer in {timeout:.0f} s; is slurmctld up?") from None
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines())
        raise SlurmError(f"{' '.join(words[:2])}: {said}")
    return done.stdout


def queue(arrays: Collection[str]) -> list[QueuedJob]:
    """Those of our jobs with these ids (as sbatch gave them) that wait or work; elements of arrays one by one."""
    if not arrays:
        return []
    text = command("squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i|%T|%r|%N|%S")
    jobs = [QueuedJob(*line.strip().split("|", 4)) for line in text.splitlines() if line.count("|") >= 4]
    return [job for job in jobs if job.array in arrays]


def job_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says of a job; empty once Slurm has forgotten it (MinJobAge)."""
    try:
        text = command("scontrol", "--oneliner", "show", "job", job)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return _fields(text.splitlines()[0]) if text.strip() else {}


def is_at_work(job: str, launch: int) -> bool:
    """Whether this very start of a job (`launch` requeues came before it) still has processes."""
    fields = job_fields(job)
    return fields.get("JobState") in AT_WORK and int(fields.get("Restarts", 0)) == launch


def configuration(timeout: float = 60) -> dict[str, str]:
    """`scontrol show config`, keys as Slurm spells them."""
    lines = command("scontrol", "show", "config", timeout=timeout).splitlines()
    pairs = [line.partition("=") for line in lines if "=" in line]
    return {key.strip(): value.strip() for key, _, value in pairs}


def partition(name: str | None) -> dict[str, str]:
    """`scontrol show partition`; of the default one for None. Raises SlurmError where there is none of that name."""
    text = command("scontrol", "--oneliner", "show", "partition", *([name] if name else []))
    found = [_fields(line) for line in text.splitlines() if line.strip()]
    for fields in found:
        if name or fields.get("Default") == "YES":
            return fields
    raise SlurmError("the cluster has no default partition; name one in the profile (slurm.partition)")


def broken_nodes(nodes: str) -> list[str]:
    """Those of the nodes that Slurm itself takes for down or failing."""
    if not nodes:
        return []
    lines = command("sinfo", "--noheader", "--Node", "--nodes", nodes, "--format", "%N %T").splitlines()
    pairs = {tuple(line.split()[:2]) for line in lines if line.split()}
    return sorted(name for name, state in pairs if re.match(r"down|fail|drain|drng|unknown", state))


def accounted(jobs: Iterable[str]) -> dict[str, str]:
    """States by job id from sacct; empty where there is no accounting, or it does not answer."""
    try:
        text = command("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(jobs), timeout=10)
    except SlurmError:
        return {}
    pairs = [line.split("|")[:2] for line in text.splitlines() if "|" in line]
    return {job: state.split()[0] for job, state in pairs if state}


def try_script(script: Path, *options: str) -> None:
    """Has Slurm look at a batch script without queueing it; raises SlurmError with what it says against it."""
    command("sbatch", "--test-only", *options, str(script))


def cancel(jobs: Collection[str], waiting_only: bool = False) -> None:
    """Takes jobs out of the queue; Slurm sends SIGTERM to those at work, SIGKILL after KillWait."""
    if jobs:
        command("scancel", "--quiet", *(["--state", "PENDING"] if waiting_only else []), *jobs)


def tell(job: str, signal_name: str) -> None:
    """Sends a signal to all ranks of a job."""
    try:
        command("scancel", "--signal", signal_name, job)
    except SlurmError as error:
        # ESLURM_ALREADY_DONE & 255. Seen on 22.05: the signal arrived, slurmctld asked scancel to try again, and by
        # then the job had obeyed.
        if "exit code 229" not in str(error):
            raise


def requeue(job: str) -> None:
    """Back to the queue, under the same id."""
    command("scontrol", "requeue", job)


def exclude_nodes(job: str, nodes: Iterable[str]) -> None:
    """Keeps a waiting job away from nodes."""
    command("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def seconds(text: str) -> int | None:
    """A time as Slurm shows it (`30 sec`, `00:05:00`, `1-00:00:00`), in seconds; None for UNLIMITED and the like."""
    if match := re.fullmatch(r"(\d+)(?: sec)?", text):
        return int(match[1])
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    return None


def _fields(line: str) -> dict[str, str]:
    """`Key=value Key=value`; values may hold blanks, keys are words that begin with a capital."""
    pairs = re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|$)", line)
    # The first of a name counts: what comes later, such as a comment, may be the user's own text.
    return {key: value.strip() for key, value in reversed(pairs)}
