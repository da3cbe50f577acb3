"""`crystal doctor`: which ways of recovering will work on a cluster, read from Slurm's own settings before any run.

`examine` asks Slurm's commands and has pure functions judge the answers; `probe` looks at the nodes themselves. Neither
belongs to a run, nor changes one.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from crystal_hpc.config.schema import Cluster, Slurm
from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import slurm
from crystal_hpc.jobs.queueing import most_elements

Settings = Mapping[str, str]
Verdict = Literal["good", "note", "bad"]

NEEDED = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SHORTEST_SAVE = 10  # seconds in which not even a small run can be told, finish its step and save
OUR_EXIT_CODES = {1, 2}  # of a batch script whose run must not go on by itself


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and, in one line, what it means for a run here."""

    name: str
    verdict: Verdict
    """`bad`: something will fail as things are; `note`: worth knowing, nothing that must be done."""
    said: str


def examine(cluster: Cluster | None) -> list[Finding]:
    """What Slurm's settings mean for runs here, or for those of a profile. Raises SlurmError."""
    if cluster and cluster.executor == "local":
        return [Finding("executor", "good", "local: the ranks are processes of this machine, Slurm is not asked")]
    refuse_without_slurm()
    config, wanted = slurm.configuration(), cluster.slurm if cluster else Slurm()
    partition = slurm.partition(wanted.partition)
    findings = judge_cluster(config, partition, cluster)
    if cluster:
        lines = slurm.command("sinfo", "-h", "-p", partition["PartitionName"], "-o", "%D %G").splitlines()
        findings += [judge_gpus(lines, cluster), *judge_container(slurm.command("srun", "--help"), cluster)]
    return findings


def describe(findings: Sequence[Finding]) -> str:
    """Findings as a table, and how many there are of each verdict."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = [f"{finding.verdict:<4}  {finding.name:<{width}}  {finding.said}" for finding in findings]
    counts = Counter(finding.verdict for finding in findings)
    return "\n".join([*lines, f"{counts['good']} good, {counts['note']} note, {counts['bad']} bad"])


def judge_cluster(config: Settings, partition: Settings, cluster: Cluster | None) -> list[Finding]:
    """Every setting of `scontrol show config` and of the partition that decides how runs recover."""
    wanted = cluster.slurm if cluster else Slurm()
    return [
        Finding("slurm", "good", f"version {config.get('SLURM_VERSION', 'unknown')}"),
        *_preemption(config, partition, cluster),
        *_signals(config),
        *_requeueing(config, wanted),
        _arrays(config, wanted),
        *_lost_nodes(config, cluster),
        *_exit_codes(config),
        *_accounts(config, wanted),
        *_partition(config, partition, cluster),
    ]


def judge_gpus(lines: Sequence[str], cluster: Cluster) -> Finding:
    """The partition's GPUs against the profile; each line says how many nodes have which gres (`2 gpu:a100:4`)."""
    found = [(int(line.split()[0]), re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", line)) for line in lines if line.strip()]
    counts = [(nodes, sum(map(int, gpus))) for nodes, gpus in found]
    most, ranks = max((gpus for _, gpus in counts), default=0), cluster.ranks_per_node
    if not cluster.slurm.gpus:
        return Finding("gpus", "note" if most else "good", f"slurm.gpus: false asks for none; nodes have up to {most}")
    enough = sum(nodes for nodes, gpus in counts if gpus >= ranks)
    said = f"{enough} nodes have {ranks} or more, one for each rank; the profile asks for {cluster.nodes}"
    fix = f"lower nodes, or ranks_per_node to {most} at most" if most else "set slurm.gpus: false"
    return Finding("gpus", "bad", f"{said}: {fix}") if enough < cluster.nodes else Finding("gpus", "good", said)


def judge_container(srun_help: str, cluster: Cluster) -> list[Finding]:
    """Whether the profile's container runtime is there, as far as a login node can tell."""
    container, pyxis = cluster.slurm.container, "--container-image" in srun_help
    if container is None:
        return []
    if container.runtime == "apptainer":
        return [Finding("container", "note", "apptainer: a login node cannot see whether the compute nodes have it")]
    said = "srun knows" if pyxis else "use apptainer, or no container: srun does not know"
    return [Finding("container", "good" if pyxis else "bad", f"pyxis: {said} --container-image")]


def refuse_without_slurm() -> None:
    """Raises SlurmError where one of Slurm's commands is missing."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        raise SlurmError(f"{', '.join(missing)}: not found; run the doctor on a login node of the cluster")


def _seconds(settings: Settings, key: str, default: int = 0) -> int:
    value = slurm.seconds(settings.get(key, ""))
    return default if value is None else value


def _preempt_mode(config: Settings, partition: Settings) -> str:
    """What befalls a preempted job: REQUEUE, CANCEL, SUSPEND or GANG; OFF where nothing ever does."""
    kind, mode = config.get("PreemptType", "preempt/none"), config.get("PreemptMode", "OFF")
    if kind == "preempt/partition_prio":  # the only kind by which a partition has a mode of its own
        mode = partition.get("PreemptMode", mode)
    possible = ("GANG",) if kind == "preempt/none" else ("REQUEUE", "CANCEL", "SUSPEND", "GANG")
    return next((word for word in possible if word in mode.split(",")), "OFF")


def _preemption(config: Settings, partition: Settings, cluster: Cluster | None) -> Iterator[Finding]:
    mode, grace = _preempt_mode(config, partition), _seconds(partition, "GraceTime")
    verdict, said = _when_preempted(mode, grace, cluster is not None and cluster.slurm.resume_by == "slices")
    yield Finding("preemption", verdict, f"PreemptMode={mode}: {said}")
    if mode != "OFF" and config.get("PreemptType") == "preempt/qos":
        yield Finding("qos", "note", "QOSes may set another: sacctmgr show qos format=name,preemptmode,gracetime")
    if mode in ("REQUEUE", "CANCEL"):
        yield _grace(grace, _seconds(config, "KillWait", 30), cluster)


def _when_preempted(mode: str, grace: int, sliced: bool) -> tuple[Verdict, str]:
    if mode == "OFF":
        return "note", "jobs are never preempted; only time limits and lost nodes interrupt a run"
    if mode in ("SUSPEND", "GANG"):
        return "note", "a job may be stopped in memory; if for longer than hang_limit, it is taken for one that hangs"
    if mode == "REQUEUE":
        return "good", "a preempted job saves and goes back to the queue under its id"
    if sliced:
        return "good", "a preempted job saves, and the next slice goes on"
    back = "puts itself back in the queue"
    said = f"saves and {back} before its grace ends" if grace else f"saves within KillWait and {back}"
    return "note", f"a preempted job {said}; if it cannot, only slurm.resume_by: slices goes on"


def _grace(grace: int, kill_wait: int, cluster: Cluster | None) -> Finding:
    total, delay = grace + kill_wait, cluster.signal_delay if cluster else 0
    said = f"a preempted job has {total} s to save (GraceTime {grace} + KillWait {kill_wait})"
    if total < SHORTEST_SAVE:
        return Finding("grace", "bad", f"{said}: too few; what counts is the last checkpoint, so set checkpoint_every")
    if total < delay:
        return Finding("grace", "note", f"{said}, less than before a time limit (signal_delay: {delay} s)")
    return Finding("grace", "good", said)


def _signals(config: Settings) -> Iterator[Finding]:
    seconds, name = _seconds(config, "KillWait", 30), "preempt_send_user_signal"
    said = f"KillWait={seconds} s to save after scancel; crystal cancel leaves a job all the time it needs"
    yield Finding("kill wait", "good" if seconds >= SHORTEST_SAVE else "note", said)
    if name in config.get("SlurmctldParameters", ""):
        said = "a preempted job gets USR2, as before its time limit, and the journal calls it that"
        yield Finding("signals", "note", f"{name} is set: {said}")
    else:
        yield Finding("signals", "good", f"{name} is not set, nor needed: a preempted job saves on SIGTERM")


def _requeueing(config: Settings, wanted: Slurm) -> Iterator[Finding]:
    asked = config.get("JobRequeue", "1") == "0"
    said = "JobRequeue=0: only jobs that ask for it, as ours do (--requeue)" if asked else "JobRequeue=1: allowed"
    yield Finding("requeue", "note" if asked else "good", f"{said}; resume_by: {wanted.resume_by}")
    match = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    wait = int(match[1]) if match else 120
    said = f"a requeued job starts again no sooner than about {wait} s later (AuthInfo, cred_expire={wait})"
    yield Finding("start again", "good" if wait <= 30 else "note", said)


def _arrays(config: Settings, wanted: Slurm) -> Finding:
    most, slices = most_elements(dict(config)), wanted.slices
    limit = "MaxArraySize" if config.get("MaxArraySize", str(most)) == str(most) else "max_array_tasks"
    if wanted.resume_by == "requeue":
        return Finding("arrays", "good", f"{limit}={most}: resume_by: requeue needs no arrays")
    if most == 0:
        return Finding("arrays", "bad", f"{limit}=0: no arrays, hence no slices; set slurm.resume_by: requeue")
    said = f"{limit}={most}: {slices} slices of a phase make arrays: {-(-slices // most)}, one after the other"
    return Finding("arrays", "note" if slices > most else "good", said)


def _lost_nodes(config: Settings, cluster: Cluster | None) -> Iterator[Finding]:
    timeout, limit = _seconds(config, "SlurmdTimeout", 300), cluster.hang_limit if cluster else 900
    seen = 2.5 * timeout  # 27 s were measured with 10; 0 means never
    soon = 0 < seen <= limit
    said = f"requeued after about {seen:.0f} s" if soon else f"given up by the other ranks after {limit} s (hang_limit)"
    yield Finding("dead nodes", "good" if soon else "note", f"SlurmdTimeout={timeout} s: a job that lost one is {said}")
    age = _seconds(config, "MinJobAge", 300)
    said = f"MinJobAge={age} s: so long Slurm remembers a job that has ended; the journal keeps what a run needs"
    yield Finding("ended jobs", "good" if age == 0 or age >= 60 else "note", said)


def _exit_codes(config: Settings) -> Iterator[Finding]:
    for key in ("RequeueExit", "RequeueExitHold"):
        text = config.get(key, "(null)")
        ranges = [(int(low), int(high or low)) for low, high in re.findall(r"(\d+)(?:-(\d+))?", text)]
        said = "none of our jobs ends with these"
        if any(low <= code <= high for code in OUR_EXIT_CODES for low, high in ranges):
            said = "a run that has stopped for good is brought back; take it out with: crystal cancel"
        if ranges:
            yield Finding("exit codes", "note", f"{key}={text}: {said}")


def _accounts(config: Settings, wanted: Slurm) -> Iterator[Finding]:
    kind, enforced = (config.get(f"AccountingStorage{key}", "none") for key in ("Type", "Enforce"))
    said = f"{kind}: nothing needs it; squeue, scontrol and the journal tell how jobs do"
    yield Finding("accounting", "note" if kind.endswith("none") else "good", said)
    if re.search("associations|limits|qos|safe", enforced) and not wanted.account:
        said = f"AccountingStorageEnforce={enforced}: jobs are charged to your default account"
        yield Finding("account", "note", f"{said}; if you have none, or for another, set slurm.account")


def _partition(config: Settings, partition: Settings, cluster: Cluster | None) -> Iterator[Finding]:
    name, state = partition["PartitionName"], partition.get("State", "UP")
    default = " (the default)" if partition.get("Default") == "YES" else ""
    waits = "" if state == "UP" else ", and jobs wait until it is UP"
    yield Finding("partition", "bad" if waits else "good", f"{name}{default} is {state}{waits}")
    if cluster:
        time_text, limit = partition.get("MaxTime", "UNLIMITED"), cluster.time_limit
        short = (slurm.seconds(time_text) or limit) < limit
        said = f"MaxTime={time_text}, and time_limit: {limit} s" + (" does not fit: lower it" if short else " fits")
        yield Finding("time limit", "bad" if short else "good", said)
        counts = {key: partition.get(key, "UNLIMITED") for key in ("MaxNodes", "TotalNodes")}
        few = any(int(count) < cluster.nodes for count in counts.values() if count.isdecimal())
        said = ", ".join(f"{key}={count}" for key, count in counts.items()) + f", and nodes: {cluster.nodes} "
        yield Finding("nodes", "bad" if few else "good", said + ("do not fit: lower it" if few else "fit"))
    if config.get("EnforcePartLimits", "NO") == "NO":
        said = "EnforcePartLimits=NO: a job beyond these limits is not refused, it waits for ever"
        yield Finding("limits", "note", f"{said}; crystal status shows the reason")
