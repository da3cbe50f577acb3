"""The doctor says of every setting what it means for a run, and finds out by a real job what the nodes are like."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config.schema import Cluster
from crystal_hpc.errors import ConfigError, RunError, SlurmError
from crystal_hpc.jobs.doctor import (
    Finding,
    check_nodes,
    describe,
    examine,
    judge_cluster,
    judge_container,
    judge_gpus,
    judge_probes,
)

ROOT = Path(__file__).parents[2]

# As `scontrol show config` and `scontrol show partition` of Slurm 22.05 print them.
CONFIG = {
    "AccountingStorageEnforce": "none",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AuthInfo": "socket=/run/munge.socket,cred_expire=5",
    "EnforcePartLimits": "ALL",
    "JobRequeue": "1",
    "KillWait": "30 sec",
    "MaxArraySize": "1001",
    "MinJobAge": "300 sec",
    "PreemptMode": "REQUEUE",
    "PreemptType": "preempt/partition_prio",
    "RequeueExit": "(null)",
    "RequeueExitHold": "(null)",
    "SLURM_VERSION": "22.05.8",
    "SlurmctldParameters": "(null)",
    "SlurmdTimeout": "300 sec",
}
PARTITION = {
    "PartitionName": "gpu",
    "Default": "YES",
    "GraceTime": "60",
    "MaxNodes": "UNLIMITED",
    "MaxTime": "1-00:00:00",
    "PreemptMode": "REQUEUE",
    "State": "UP",
    "TotalNodes": "8",
}


def profile(**changes: Any) -> Cluster:
    """A profile of two nodes with two GPUs each; keys of `slurm` are given as they are."""
    own = {key: changes.pop(key) for key in list(changes) if key in Cluster.model_fields}
    base = {"name": "here", "executor": "slurm", "nodes": 2, "ranks_per_node": 2, "time_limit": "1h", "slurm": changes}
    return Cluster.model_validate({**base, **own})


def judged(name: str, config: dict[str, str], partition: dict[str, str], **changes: Any) -> Finding:
    """What is found under a name, settings and profile being as always but for these changes."""
    found = judge_cluster({**CONFIG, **config}, {**PARTITION, **partition}, profile(**changes))
    (one,) = [finding for finding in found if finding.name == name]
    return one


SLICES = {"resume_by": "slices"}
CANCEL = {"PreemptMode": "CANCEL"}
TABLE: list[tuple[str, dict[str, str], dict[str, str], dict[str, Any], str, str]] = [
    # name, config, partition, profile: verdict, words
    ("slurm", {}, {}, {}, "good", "22.05.8"),
    ("preemption", {}, {}, {}, "good", "goes back to the queue"),
    ("preemption", {"PreemptType": "preempt/none", "PreemptMode": "OFF"}, {}, {}, "note", "never preempted"),
    ("preemption", {}, {"PreemptMode": "OFF"}, {}, "note", "never preempted"),
    ("preemption", {}, CANCEL, {}, "note", "puts itself back"),
    ("preemption", {}, {**CANCEL, "GraceTime": "0"}, {}, "bad", "set slurm.resume_by: slices"),
    ("preemption", {}, {**CANCEL, "GraceTime": "0"}, SLICES, "good", "the next slice goes on"),
    ("preemption", {}, {"PreemptMode": "GANG,SUSPEND"}, {}, "note", "hang_limit"),
    ("preemption", {"PreemptType": "preempt/none", "PreemptMode": "GANG"}, {}, {}, "note", "stopped in memory"),
    # A partition has a mode of its own with partition_prio alone.
    ("preemption", {"PreemptType": "preempt/qos"}, {"PreemptMode": "OFF"}, {}, "good", "PreemptMode=REQUEUE"),
    ("qos", {"PreemptType": "preempt/qos"}, {}, {}, "note", "sacctmgr show qos"),
    ("grace", {}, {}, {}, "good", "has 90 s to save (GraceTime 60 + KillWait 30)"),
    ("grace", {}, {}, {"signal_delay": "5min"}, "note", "signal_delay: 300 s"),
    ("grace", {}, {"GraceTime": "00:01:00"}, {}, "good", "GraceTime 60"),
    ("grace", {"KillWait": "5 sec"}, {"GraceTime": "0"}, {}, "bad", "has 5 s to save"),
    ("kill wait", {}, {}, {}, "good", "KillWait=30 s"),
    ("kill wait", {"KillWait": "5 sec"}, {}, {}, "note", "crystal cancel"),
    ("signals", {}, {}, {}, "good", "saves on SIGTERM"),
    ("signals", {"SlurmctldParameters": "a=1,preempt_send_user_signal"}, {}, {}, "note", "USR2"),
    ("requeue", {}, {}, {}, "good", "JobRequeue=1"),
    ("requeue", {"JobRequeue": "0"}, {}, {}, "note", "--requeue"),
    ("start again", {}, {}, {}, "good", "about 5 s"),
    ("start again", {"AuthInfo": "(null)"}, {}, {}, "note", "about 120 s"),
    ("arrays", {"MaxArraySize": "0"}, {}, {}, "good", "needs no arrays"),
    ("arrays", {"MaxArraySize": "0"}, {}, SLICES, "bad", "resume_by: requeue"),
    ("arrays", {"MaxArraySize": "8"}, {}, SLICES, "note", "20 slices of a phase make arrays: 3,"),
    ("arrays", {"MaxArraySize": "20"}, {}, SLICES, "good", "make arrays: 1,"),
    ("dead nodes", {}, {}, {}, "good", "after about 750 s"),
    ("dead nodes", {"SlurmdTimeout": "0 sec"}, {}, {}, "note", "after 900 s (hang_limit)"),
    ("dead nodes", {}, {}, {"hang_limit": "10min"}, "note", "after 600 s (hang_limit)"),
    ("ended jobs", {}, {}, {}, "good", "MinJobAge=300 s"),
    ("ended jobs", {"MinJobAge": "10 sec"}, {}, {}, "note", "MinJobAge=10 s"),
    ("exit codes", {"RequeueExit": "9,17-20"}, {}, {}, "note", "none of our jobs"),
    ("exit codes", {"RequeueExitHold": "100,1-10"}, {}, {}, "note", "crystal cancel"),
    ("accounting", {}, {}, {}, "good", "nothing needs it"),
    ("accounting", {"AccountingStorageType": "accounting_storage/none"}, {}, {}, "note", "nothing needs it"),
    ("account", {"AccountingStorageEnforce": "associations,limits"}, {}, {}, "note", "set slurm.account"),
    ("partition", {}, {}, {}, "good", "gpu (the default) is UP"),
    ("partition", {}, {"State": "DOWN", "Default": "NO"}, {}, "bad", "gpu is DOWN"),
    ("time limit", {}, {}, {"time_limit": "24h"}, "good", "MaxTime=1-00:00:00"),
    ("time limit", {}, {}, {"time_limit": "25h"}, "bad", "90000 s does not fit"),
    ("time limit", {}, {"MaxTime": "UNLIMITED"}, {"time_limit": "900h"}, "good", "UNLIMITED"),
    ("nodes", {}, {}, {"nodes": 8}, "good", "TotalNodes=8"),
    ("nodes", {}, {}, {"nodes": 9}, "bad", "nodes: 9 do not fit"),
    ("nodes", {}, {"MaxNodes": "1"}, {}, "bad", "MaxNodes=1"),
    ("limits", {"EnforcePartLimits": "NO"}, {}, {}, "note", "waits for ever"),
]


@pytest.mark.parametrize(("name", "config", "partition", "changes", "verdict", "words"), TABLE)
def test_each_setting_is_judged(
    name: str, config: dict[str, str], partition: dict[str, str], changes: dict[str, Any], verdict: str, words: str
) -> None:
    found = judged(name, config, partition, **changes)
    assert found.verdict == verdict, found
    assert words in found.said
    assert "\n" not in found.said


def test_what_does_not_apply_is_not_mentioned() -> None:
    names = [finding.name for finding in judge_cluster(CONFIG, PARTITION, profile(account="research"))]
    assert not {"qos", "exit codes", "account", "limits"} & set(names)
    enforced = {**CONFIG, "AccountingStorageEnforce": "associations"}
    assert "account" not in [finding.name for finding in judge_cluster(enforced, PARTITION, profile(account="x"))]
    never = [finding.name for finding in judge_cluster(CONFIG, {**PARTITION, "PreemptMode": "OFF"}, None)]
    assert not {"grace", "time limit", "nodes"} & set(never)


@pytest.mark.parametrize(
    ("lines", "changes", "verdict", "words"),
    [
        (["2 gpu:2"], {}, "good", "2 nodes have 2 or more"),
        (["1 gpu:a100:4(S:0-1),shard:8", "9 (null)", "1 gpu:3090:2"], {}, "good", "2 nodes"),
        (["4 gpu:a:1,gpu:b:1"], {}, "good", "4 nodes"),
        (["9 gpu:1", "1 gpu:2"], {}, "bad", "1 nodes have 2 or more"),
        (["9 gpu:1"], {}, "bad", "ranks_per_node to 1"),
        (["9 (null)"], {}, "bad", "slurm.gpus: false"),
        ([], {}, "bad", "slurm.gpus: false"),
        (["9 gpu:1"], {"gpus": False}, "note", "up to 1"),
        (["9 (null)", ""], {"gpus": False}, "good", "asks for none"),
    ],
)
def test_the_gpus_of_a_partition_are_counted(lines: list[str], changes: Any, verdict: str, words: str) -> None:
    found = judge_gpus(lines, profile(**changes))
    assert (found.verdict, words in found.said) == (verdict, True), found


def test_a_container_needs_its_runtime() -> None:
    def verdicts(runtime: str, text: str) -> list[str]:
        container = {"runtime": runtime, "image": "image.sqsh"}
        return [finding.verdict for finding in judge_container(text, profile(container=container))]

    assert verdicts("pyxis", "  --container-image=[USER@][REGISTRY#]IMAGE") == ["good"]
    assert verdicts("pyxis", "  --container   Path to OCI container bundle") == ["bad"]
    assert verdicts("apptainer", "") == ["note"]
    assert judge_container("", profile()) == []


def two_probes(delay: float = 0.1, ahead: float = 0.0, **second: Any) -> dict[str, Any]:
    """What two nodes wrote: files need `delay` seconds each way, and n2's clock is `ahead` of n1's."""
    seen = {"gpus": 2, "commit": 0.01, "refusal": "", "free_gib": 5.0}
    sent = 1000.0
    called = sent + delay + 0.05
    first = {**seen, "rank": 0, "noticed": {"1": sent + delay}, "called": called}
    return {"n1": first, "n2": {**seen, "rank": 1, "sent": sent + ahead, "heard": called + delay + ahead, **second}}


def node_verdicts(answers: dict[str, Any], **changes: Any) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.verdict, finding.said) for finding in judge_probes(answers, profile(**changes))}


def test_nodes_that_are_as_they_should_be() -> None:
    found = node_verdicts(two_probes(), scratch="/scratch")
    assert {verdict for verdict, _ in found.values()} == {"good"}
    assert set(found) == {"nodes", "gpus", "scratch", "commit", "shared folder", "clocks"}


@pytest.mark.parametrize(("ahead", "apart"), [(5.0, True), (-5.0, True), (0.5, False), (-0.5, False)])
def test_clocks_are_compared_whatever_the_way_takes(ahead: float, apart: bool) -> None:
    verdict, said = node_verdicts(two_probes(ahead=ahead))["clocks"]
    assert (verdict == "note") == apart
    assert ("n2 is off by 4.9 s" in said) == apart
    slow = node_verdicts(two_probes(delay=20.0, ahead=0.5))
    assert slow["clocks"][0] == "good"
    assert slow["shared folder"][0] == "note"


@pytest.mark.parametrize(
    ("second", "name", "verdict", "words"),
    [
        ({"gpus": 1}, "gpus", "bad", "n2 sees 1"),
        ({"refusal": "/scratch: Permission denied"}, "scratch", "bad", "n2: /scratch: Permission denied"),
        ({"free_gib": 0.25}, "scratch", "good", "0.2 GiB"),
        ({"commit": 3.0}, "commit", "note", "3000.0 ms"),
        ({"heard": None}, "shared folder", "bad", "from n2 to n1"),
    ],
)
def test_a_node_that_is_not_as_it_should_be(second: dict[str, Any], name: str, verdict: str, words: str) -> None:
    found = node_verdicts(two_probes(**second), scratch="/scratch")[name]
    assert (found[0], words in found[1]) == (verdict, True), found


def test_one_node_has_nobody_to_meet() -> None:
    answers = two_probes()
    assert "clocks" not in node_verdicts({"n1": {**answers["n1"], "noticed": {}}})
    assert "clocks" not in node_verdicts({"n2": answers["n2"]})


def test_findings_are_an_aligned_table() -> None:
    text = describe([Finding("a", "good", "one"), Finding("longer", "bad", "two"), Finding("b", "bad", "three")])
    assert text.splitlines() == [
        "good  a       one",
        "bad   longer  two",
        "bad   b       three",
        "1 good, 0 note, 2 bad",
    ]
    assert describe([]) == "0 good, 0 note, 0 bad"


def test_a_local_profile_has_nothing_to_examine(tmp_path: Path) -> None:
    local = Cluster.model_validate({"name": "here", "executor": "local", "ranks_per_node": 2, "time_limit": "1h"})
    assert [finding.verdict for finding in examine(local)] == ["good"]
    with pytest.raises(ConfigError, match="executor: slurm"):
        check_nodes(local, tmp_path)


def test_without_slurm_it_says_where_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for look in (lambda: examine(None), lambda: check_nodes(profile(), tmp_path / "runs")):
        with pytest.raises(SlurmError, match=r"sbatch, .*: not found; run the doctor on a login node[^\n]*$"):
            look()
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_slurm_would_misread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="choose another folder"):
        check_nodes(profile(), tmp_path / "50%")


@pytest.fixture(scope="module")
def real_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two virtual nodes n1 and n2 of a private Slurm, for this process and its children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "slurm" / "devcluster"))
        from devcluster import ClusterError, DevCluster, install

        if os.geteuid() != 0:
            pytest.skip("Slurm's daemons need root")
        try:
            install(accounting=False)
            cluster = DevCluster(tmp_path_factory.mktemp("slurm"))
            cluster.up(nodes=2, gpus=2, accounting=False, grace=20, kill_wait=20, max_array_size=1001)
        except ClusterError as error:
            pytest.skip(str(error))
        for key, value in cluster.environment.items():
            patch.setenv(key, value)
        yield
        cluster.down()


def queued() -> str:
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True, timeout=30).stdout


def verdicts(findings: list[Finding]) -> dict[str, tuple[str, str]]:
    assert all("\n" not in finding.said for finding in findings)
    return {finding.name: (finding.verdict, finding.said) for finding in findings}


@pytest.mark.usefixtures("real_slurm")
def test_a_cluster_is_examined_without_a_profile() -> None:
    found = verdicts(examine(None))
    assert found["grace"] == ("good", "a preempted job has 40 s to save (GraceTime 20 + KillWait 20)")
    assert found["partition"][1] == "normal (the default) is UP"
    assert re.fullmatch(r"version \d+\.\d+\.\d+.*", found["slurm"][1])
    assert "about 5 s" in found["start again"][1]
    assert "bad" not in [verdict for verdict, _ in found.values()]


@pytest.mark.usefixtures("real_slurm")
def test_a_profile_that_fits_and_one_that_does_not() -> None:
    found = verdicts(examine(profile(partition="normal")))
    assert "bad" not in [verdict for verdict, _ in found.values()]
    container = {"runtime": "pyxis", "image": "image.sqsh"}
    found = verdicts(examine(profile(partition="urgent", nodes=5, ranks_per_node=4, container=container)))
    assert [name for name, (verdict, _) in found.items() if verdict == "bad"] == ["nodes", "gpus", "container"]
    assert "never preempted" in found["preemption"][1]


@pytest.mark.usefixtures("real_slurm")
def test_an_unknown_partition_is_reported_in_slurms_words(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match=r"^[^\n]*Partition nope not found$"):
        examine(profile(partition="nope"))
    with pytest.raises(SlurmError, match=r"^sbatch[^\n]*Invalid partition name specified$"):
        check_nodes(profile(partition="nope"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("real_slurm")
def test_every_node_is_looked_at_by_one_job(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    setup = [f"export PLACE={tmp_path}"]
    findings = check_nodes(profile(setup=setup, scratch="$PLACE/scratch", options={"comment": "x"}), tmp_path)
    found = verdicts(findings)
    assert {verdict for verdict, _ in found.values()} == {"good"}, describe(findings)
    assert found["nodes"][1] == "n1, n2 answered"
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.usefixtures("real_slurm")
def test_a_scratch_that_is_not_there_is_found(tmp_path: Path) -> None:
    found = verdicts(check_nodes(profile(nodes=1, scratch=f"{tmp_path}/none"), tmp_path))
    assert found["scratch"][0] == "bad"
    assert "none: No such file or directory" in found["scratch"][1]
    found = verdicts(check_nodes(profile(nodes=1, gpus=False, scratch="$NOT_SET"), tmp_path))
    assert "n1: slurm.scratch is empty" in found["scratch"][1]
    assert "gpus" not in found


@pytest.mark.usefixtures("real_slurm")
def test_nodes_that_say_nothing_are_named(tmp_path: Path) -> None:
    findings = check_nodes(profile(setup=["echo no such module", "exit 3"]), tmp_path)
    assert [(finding.name, finding.verdict) for finding in findings] == [("silent nodes", "bad")]
    assert findings[0].said.startswith("n1, n2 left nothing in ")
    assert findings[0].said.endswith("FAILED, with at last: no such module")


@pytest.mark.usefixtures("real_slurm")
@pytest.mark.parametrize(
    ("changes", "verdict", "state"),
    [({"nodes": 5}, "note", "PENDING"), ({"setup": ["sleep 60"]}, "bad", "RUNNING")],
)
def test_a_job_that_takes_too_long_is_cancelled(
    tmp_path: Path, changes: dict[str, Any], verdict: str, state: str
) -> None:
    (finding,) = check_nodes(profile(**changes), tmp_path, timeout=3)
    assert (finding.name, finding.verdict) == ("nodes", verdict)
    assert re.fullmatch(rf"job \d+ was still {state} after 3 s \(reason: \w+\): cancelled", finding.said)
    assert queued() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("real_slurm")
def test_an_impatient_user_leaves_nothing_behind(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from crystal_hpc.config.schema import Cluster
from crystal_hpc.jobs.doctor import check_nodes
check_nodes(Cluster.model_validate({profile(nodes=5).model_dump(mode="json")!r}), Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not queued() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)  # sbatch has been left
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert queued() == ""
    assert list(tmp_path.iterdir()) == []
