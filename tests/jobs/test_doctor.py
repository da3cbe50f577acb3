"""The doctor says of every setting what it means for a run; what Slurm would answer is given here."""

from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config.schema import Cluster
from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs.doctor import Finding, describe, examine, judge_cluster, judge_container, judge_gpus

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
    ("preemption", {}, CANCEL, {}, "note", "puts itself back in the queue before its grace ends"),
    ("preemption", {}, {**CANCEL, "GraceTime": "0"}, {}, "note", "saves within KillWait and puts itself back"),
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
    ("arrays", {"MaxArraySize": "20"}, {}, SLICES, "good", "MaxArraySize=20: 20 slices of a phase make arrays: 1,"),
    ("arrays", {"SchedulerParameters": "bf_interval=9,max_array_tasks=8"}, {}, SLICES, "note", "max_array_tasks=8: 20"),
    ("arrays", {"SchedulerParameters": "max_array_tasks=2000"}, {}, SLICES, "good", "MaxArraySize=1001: 20"),
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


def test_findings_are_an_aligned_table() -> None:
    text = describe([Finding("a", "good", "one"), Finding("longer", "bad", "two"), Finding("b", "bad", "three")])
    assert text.splitlines() == [
        "good  a       one",
        "bad   longer  two",
        "bad   b       three",
        "1 good, 0 note, 2 bad",
    ]
    assert describe([]) == "0 good, 0 note, 0 bad"


def test_a_local_profile_has_nothing_to_examine() -> None:
    local = Cluster.model_validate({"name": "here", "executor": "local", "ranks_per_node": 2, "time_limit": "1h"})
    assert [finding.verdict for finding in examine(local)] == ["good"]


def test_without_slurm_it_says_where_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"sbatch, .*: not found; run the doctor on a login node[^\n]*$"):
        examine(None)
