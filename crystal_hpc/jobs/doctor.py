"""`crystal doctor`: which ways of recovering will work on a cluster, read from Slurm's own settings before any run.

`examine` asks Slurm's commands and has pure functions judge the answers. `check_nodes` looks at the nodes themselves
by one short job, each task of which runs this module with `--probe`. Neither belongs to a run, nor changes one.
"""

import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crystal_hpc import files
from crystal_hpc.config.schema import Cluster, Slurm
from crystal_hpc.errors import ConfigError, SlurmError
from crystal_hpc.jobs import slurm
from crystal_hpc.jobs.place import my_place
from crystal_hpc.jobs.queueing import check_path

Settings = Mapping[str, str]
Verdict = Literal["good", "note", "bad"]
Probe = dict[str, Any]

NEEDED = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SHORTEST_SAVE = 10  # seconds in which not even a small run can be told, finish its step and save
OUR_EXIT_CODES = {1, 2}  # of a batch script whose run must not go on by itself
UNFINISHED = slurm.WAITING | slurm.AT_WORK
PATIENCE = 60.0  # seconds of a probe with the other nodes, as of a run
LARGEST_SKEW, SLOWEST_SIGHT, SLOWEST_COMMIT = 1.0, 10.0, 1.0  # seconds


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
    _refuse_without_slurm()
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


def _refuse_without_slurm() -> None:
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
    if grace:
        said = "a preempted job saves and puts itself back in the queue before its grace ends; if it cannot, only"
        return "note", f"{said} slurm.resume_by: slices goes on"
    return "bad", "without GraceTime a preempted job saves, but does not come back: set slurm.resume_by: slices"


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
    most, slices = int(config.get("MaxArraySize", 1001)), wanted.slices
    if wanted.resume_by == "requeue":
        return Finding("arrays", "good", f"MaxArraySize={most}: resume_by: requeue needs no arrays")
    if most == 0:
        return Finding("arrays", "bad", "MaxArraySize=0: no arrays, hence no slices; set slurm.resume_by: requeue")
    said = f"MaxArraySize={most}: {slices} slices of a phase make arrays: {-(-slices // most)}, one after the other"
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


def check_nodes(cluster: Cluster, folder: Path, timeout: float = 300.0) -> list[Finding]:
    """Looks at nodes by a job that may take `timeout` seconds; `folder` is where runs will lie. Raises SlurmError."""
    if cluster.executor != "slurm":
        raise ConfigError("executor: local has no nodes to look at; take a profile with executor: slurm", cluster.name)
    _refuse_without_slurm()
    check_path(folder)
    with files.disk_errors(folder):
        place = Path(tempfile.mkdtemp(prefix=".doctor-", dir=files.make_folder(folder.resolve())))
    try:
        files.write_file(place / "job.sh", _script(cluster, place))
        job = slurm.command("sbatch", "--parsable", *_options(cluster, place), str(place / "job.sh"))
        return _follow(job.strip().partition(";")[0], cluster, place, timeout)
    finally:
        files.remove_folder(place)


def judge_probes(answers: Mapping[str, Probe], cluster: Cluster) -> list[Finding]:
    """What the nodes saw (GPUs, scratch, shared folder, each other's clocks) against the profile, by their names."""
    ranks, found = cluster.ranks_per_node, [Finding("nodes", "good", f"{', '.join(answers)} answered")]
    if cluster.slurm.gpus:
        few = ", ".join(f"{node} sees {answer['gpus']}" for node, answer in answers.items() if answer["gpus"] < ranks)
        said = f"{few}, and ranks_per_node is {ranks}" if few else f"each node sees {ranks} or more"
        found.append(Finding("gpus", "bad" if few else "good", said))
    if cluster.slurm.scratch:
        lost = ", ".join(f"{node}: {answer['refusal']}" for node, answer in answers.items() if answer["refusal"])
        free = min(answer["free_gib"] for answer in answers.values())
        said = f"{lost}; make it in slurm.setup" if lost else f"each node can write there, {free:.1f} GiB or more free"
        found.append(Finding("scratch", "bad" if lost else "good", said))
    commit = max(answer["commit"] for answer in answers.values())
    said = f"a small file is durable on shared storage after {1000 * commit:.1f} ms"
    found.append(Finding("commit", "note" if commit > SLOWEST_COMMIT else "good", said))
    first = next((node for node, answer in answers.items() if answer["rank"] == 0), None)
    return [*found, *(_judge_meeting(answers, first) if first and len(answers) > 1 else ())]


def _judge_meeting(answers: Mapping[str, Probe], first: str) -> Iterator[Finding]:
    """How long files take to show on another node; one seen before it was written proves clocks to be so far apart."""
    ways: dict[str, tuple[float, float]] = {}
    for node, answer in answers.items():
        seen, heard = answers[first]["noticed"].get(str(answer["rank"])), answer.get("heard")
        if seen is not None and heard is not None:
            ways[node] = (seen - answer["sent"], heard - answers[first]["called"])
    if blind := ", ".join(node for node in answers if node not in {first, *ways}):
        said = f"in {PATIENCE:.0f} s no file came from {blind} to {first} and back: is the folder shared?"
        yield Finding("shared folder", "bad", said)
    if ways:
        longest = max(there + back for there, back in ways.values())  # in which the clocks cancel out
        said = f"a file is seen on another node, and its answer seen here, within {longest:.1f} s"
        yield Finding("shared folder", "note" if longest > SLOWEST_SIGHT else "good", said)
        skew, node = max((-min(way), node) for node, way in ways.items())
        said = f"that of {node} is off by {skew:.1f} s or more" if skew > LARGEST_SKEW else "no difference to be seen"
        yield Finding("clocks", "note" if skew > LARGEST_SKEW else "good", said)


def _options(cluster: Cluster, place: Path) -> list[str]:
    wanted = cluster.slurm
    given = {
        "partition": wanted.partition, "account": wanted.account, "qos": wanted.qos, "constraint": wanted.constraint,
        "exclude": ",".join(wanted.exclude) or None, "mem": wanted.memory, "exclusive": wanted.exclusive,
        "gpus-per-node": cluster.ranks_per_node if wanted.gpus else None, "nodes": cluster.nodes,
        **{name.replace("_", "-"): value for name, value in wanted.options.items()},
        "ntasks-per-node": 1, "time": 5, "no-requeue": True, "job-name": "doctor", "output": place / "output",
    }  # fmt: skip
    asked = [(name, value) for name, value in given.items() if value is not None and value is not False]
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in asked]


def _script(cluster: Cluster, place: Path) -> str:
    scratch = cluster.slurm.scratch
    words = ["srun", "--kill-on-bad-exit=0", sys.executable, "-m", "crystal_hpc.jobs.doctor", "--probe", str(place)]
    lines = ["#!/bin/bash", *(f"module load {shlex.quote(module)}" for module in cluster.slurm.modules)]
    lines += [*cluster.slurm.setup, *([f'export CRYSTAL_SCRATCH="{scratch}"'] if scratch else []), shlex.join(words)]
    return "\n".join(lines) + "\n"


def _follow(job: str, cluster: Cluster, place: Path, timeout: float) -> list[Finding]:
    """Waits for the job, and judges what its tasks left; one that takes too long is cancelled."""
    fields = {"JobState": "PENDING"}
    try:
        fields = _wait_for_end(job, timeout)
    finally:  # Ctrl-C too
        state = fields.get("JobState", "UNKNOWN")
        if state in UNFINISHED:
            slurm.cancel([job])
    if state in UNFINISHED:
        _wait_for_end(job, 10)
        said = f"job {job} was still {state} after {timeout:.0f} s (reason: {fields.get('Reason')}): cancelled"
        return [Finding("nodes", "note" if state in slurm.WAITING else "bad", said)]
    nodes = slurm.command("scontrol", "show", "hostnames", fields.get("NodeList", "")).split()
    paths, deadline = {node: place / f"probe-{node}.json" for node in nodes}, time.monotonic() + SLOWEST_SIGHT
    there = [node for node in nodes if files.wait_until_visible(paths[node], max(0.0, deadline - time.monotonic()))]
    found = judge_probes({node: files.read_json(paths[node]) for node in there}, cluster) if there else []
    if len(there) < max(1, len(nodes)):
        silent = ", ".join(node for node in nodes if node not in there) or "no node"
        output = (place / "output").read_text(errors="replace") if (place / "output").exists() else ""
        last = output.strip().rpartition("\n")[2] or "no output"
        said = f"{silent} left nothing in {place.parent} (is it shared?): job {job} {state}, with at last: {last}"
        found.append(Finding("silent nodes", "bad", said))
    return found


def _wait_for_end(job: str, seconds: float) -> dict[str, str]:
    """What Slurm says of the job once it is over, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while (fields := slurm.job_fields(job)).get("JobState") in UNFINISHED and time.monotonic() < deadline:
        time.sleep(0.5)
    return fields


def probe(folder: Path) -> None:
    """What a task of the job does on its node: looks, meets the others by files, and writes down what it saw."""
    here, commits = my_place(), []
    for _ in range(9):
        began = time.perf_counter()
        files.write_file(folder / f"commit-{here.rank}", "small")
        commits.append(time.perf_counter() - began)
    devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("SLURM_STEP_GPUS") or "").split(",")
    gpus = len([device for device in devices if device not in ("", "NoDevFiles")])
    answer: Probe = {"rank": here.rank, "gpus": gpus, "commit": statistics.median(commits)}
    answer["refusal"], answer["free_gib"] = _look_at_scratch(os.environ.get("CRYSTAL_SCRATCH"))
    files.write_json(folder / f"probe-{here.node}.json", answer | _meet(folder, here.rank, here.ranks))


def _look_at_scratch(text: str | None) -> tuple[str, float]:
    """What is wrong with the scratch folder, if anything, and the GiB that are free there."""
    if not text:
        return "slurm.scratch is empty there", 0.0
    try:
        with tempfile.NamedTemporaryFile(dir=text):
            return "", shutil.disk_usage(text).free / 2**30
    except OSError as error:
        return f"{text}: {os.strerror(error.errno or 0)}", 0.0


def _meet(folder: Path, rank: int, ranks: int) -> Probe:
    """Each rank writes a file for rank 0, which answers all by one; the times are Unix's, of the node itself."""
    if rank:
        sent = time.time()
        files.write_file(folder / f"ready-{rank}", "")
        return {"sent": sent, "heard": time.time() if files.wait_until_visible(folder / "go", 2 * PATIENCE) else None}
    noticed: dict[str, float] = {}
    deadline = time.monotonic() + PATIENCE
    while len(noticed) < ranks - 1 and time.monotonic() < deadline:
        for path in folder.glob("ready-*[0-9]"):
            noticed.setdefault(path.name.partition("-")[2], time.time())
        time.sleep(0.02)
    called = time.time()
    files.write_file(folder / "go", "")
    return {"noticed": noticed, "called": called}


if __name__ == "__main__":
    probe(Path(sys.argv[2]))  # after --probe
