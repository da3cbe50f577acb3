"""`crystal doctor --nodes`: what the nodes themselves are like, found out by one short job of the profile's size.

`check_nodes` submits it and waits; each of its tasks, one a node, runs this module and leaves a file; `judge_probes`, a
pure function, makes findings of these, which `doctor` prints beside its own. The job belongs to no run.
"""

import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config.schema import Cluster
from crystal_hpc.errors import ConfigError
from crystal_hpc.jobs import slurm
from crystal_hpc.jobs.doctor import Finding, refuse_without_slurm
from crystal_hpc.jobs.place import my_place
from crystal_hpc.jobs.queueing import check_path

Probe = dict[str, Any]
UNFINISHED = slurm.WAITING | slurm.AT_WORK
PATIENCE = 60.0  # seconds of a probe with the other nodes, as of a run
LARGEST_SKEW, SLOWEST_SIGHT, SLOWEST_COMMIT = 1.0, 10.0, 1.0  # seconds


def check_nodes(cluster: Cluster, folder: Path, timeout: float = 300.0) -> list[Finding]:
    """Looks at nodes by a job that may take `timeout` seconds; `folder` is where runs will lie. Raises SlurmError."""
    if cluster.executor != "slurm":
        raise ConfigError("executor: local has no nodes to look at; take a profile with executor: slurm", cluster.name)
    refuse_without_slurm()
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
    words = ["srun", "--kill-on-bad-exit=0", sys.executable, "-m", "crystal_hpc.jobs.probe", str(place)]
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
    probe(Path(sys.argv[1]))
