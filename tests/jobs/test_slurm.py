"""What Slurm's commands print, read; and what becomes of their errors. No cluster: real lines, and programs of our own.

The lines are of Slurm 22.05.8 (`slurm/devcluster`), copied as they were but for the folders.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import slurm

RUNNING_ELEMENT = (
    "JobId=28 ArrayJobId=26 ArrayTaskId=1 ArrayTaskThrottle=1 JobName=tiny.code UserId=root(0) GroupId=root(0) "
    "MCS_label=N/A Priority=4294901743 Nice=0 Account=(null) QOS=(null) JobState=RUNNING Reason=None "
    "Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:12 TimeLimit=UNLIMITED "
    "TimeMin=N/A SubmitTime=2026-11-23T09:04:16 EligibleTime=2026-11-23T09:04:18 AccrueTime=Unknown "
    "StartTime=2026-11-23T09:04:18 EndTime=Unknown Deadline=N/A PreemptEligibleTime=2026-11-23T09:04:18 "
    "PreemptTime=None SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-23T09:04:18 Scheduler=Main "
    "Partition=normal AllocNode:Sid=localhost:28397 ReqNodeList=(null) ExcNodeList=(null) NodeList=n1 BatchHost=n1 "
    "NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=1,node=1,billing=1 Socks/Node=* "
    "NtasksPerN:B:S:C=0:0:*:* CoreSpec=* MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0 Features=(null) "
    "DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null) Command=(null) "
    "WorkDir=/shared/it's a b Comment=checked by JobState=PENDING Restarts=7  StdErr=/shared/it's a b/26_1_0_log.out "
    "StdIn=/dev/null StdOut=/shared/it's a b/26_1_0_log.out Power= TresPerNode=gres:gpu:1 "
)
WAITING_JOB = (
    "JobId=17 JobName=tiny.code UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=0 Nice=0 Account=(null) "
    "QOS=(null) JobState=PENDING Reason=JobHeldUser Dependency=afterok:16(unfulfilled) Requeue=1 Restarts=0 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=00:10:00 TimeMin=N/A "
    "SubmitTime=2026-11-23T08:53:42 EligibleTime=Unknown AccrueTime=Unknown StartTime=Unknown EndTime=Unknown "
    "Deadline=N/A SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-23T08:53:42 Scheduler=Main "
    "Partition=normal AllocNode:Sid=localhost:28397 ReqNodeList=(null) ExcNodeList=(null) NodeList= NumNodes=1-1 "
    "NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=1,mem=4000M,node=1,billing=1 Socks/Node=* "
    "NtasksPerN:B:S:C=1:0:*:* CoreSpec=* MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0 Features=(null) "
    "DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null) "
    "Command=/shared/runs/tiny/logs/.submission_file_e8f2e06299e4434cb54317038ec42d3e.sh WorkDir=/shared "
    "StdErr=/shared/runs/tiny/logs/17_0_log.out StdIn=/dev/null StdOut=/shared/runs/tiny/logs/17_0_log.out Power= "
    "KillOInInvalidDependent=Yes TresPerNode=gres:gpu:1 "
)
PARTITIONS = """\
PartitionName=normal AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A \
DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=15 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED \
MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-4] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO \
OverSubscribe=NO OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=32 TotalNodes=4 \
SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED \
TRES=cpu=32,mem=16000M,node=4,billing=32
PartitionName=urgent AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A \
DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED \
MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-4] PriorityJobFactor=1 PriorityTier=10 RootOnly=NO ReqResv=NO \
OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=32 TotalNodes=4 \
SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED \
TRES=cpu=32,mem=16000M,node=4,billing=32
"""
QUEUE = """\
26_2|PENDING|JobArrayTaskLimit||N/A
26_1|RUNNING|None|n1|2026-11-23T09:04:18
31|PENDING|Dependency||N/A
7|COMPLETING|None|n[1-2]|2026-11-23T09:01:00
8|PENDING|ReqNodeNotAvail, UnavailableNodes:n[3-4]||2026-11-24T00:00:00
"""

# `man squeue`, JOB STATE CODES.
STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "CONFIGURING", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL",
    "OUT_OF_MEMORY", "PENDING", "PREEMPTED", "RUNNING", "RESV_DEL_HOLD", "REQUEUE_FED", "REQUEUE_HOLD", "REQUEUED",
    "RESIZING", "REVOKED", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED", "TIMEOUT",
}  # fmt: skip

Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Writes a program of some name, which is found before any other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def printing(text: str) -> str:
    """A script that prints a text as it is."""
    return f"cat <<'END'\n{text.rstrip(chr(10))}\nEND"


def test_every_state_that_slurm_documents_is_of_exactly_one_kind() -> None:
    kinds = (slurm.WAITING, slurm.AT_WORK, slurm.OVER)
    assert frozenset.union(*kinds) >= STATES
    assert all(not one & other for one, other in itertools.combinations(kinds, 2))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("15", 15),
        ("30 sec", 30),
        ("0 sec", 0),
        ("00:00:10", 10),
        ("00:05:00", 300),
        ("12:34:56", 45296),
        ("1-00:00:00", 86400),
        ("365-00:00:01", 31536001),
        ("UNLIMITED", None),
        ("INFINITE", None),
        ("NONE", None),
        ("N/A", None),
        ("(null)", None),
        ("", None),
        ("-5", None),
        ("30 min", None),
    ],
)
def test_times_are_read_as_slurm_writes_them(text: str, seconds: int | None) -> None:
    assert slurm.seconds(text) == seconds


def test_the_fields_of_a_job_are_read_with_blanks_equals_signs_and_colons_in_them(fake: Fake) -> None:
    fake("scontrol", f'[ "$*" = "--oneliner show job 17" ] || exit 9\n{printing(WAITING_JOB)}')
    fields = slurm.job_fields("17")
    assert {name: fields[name] for name in ("JobId", "JobName", "JobState", "Reason", "Dependency", "Restarts")} == {
        "JobId": "17",
        "JobName": "tiny.code",
        "JobState": "PENDING",
        "Reason": "JobHeldUser",
        "Dependency": "afterok:16(unfulfilled)",
        "Restarts": "0",
    }
    assert (fields["EndTime"], fields["NodeList"], fields["Power"]) == ("Unknown", "", "")
    assert (fields["TRES"], fields["ReqB:S:C:T"]) == ("cpu=1,mem=4000M,node=1,billing=1", "0:0:*:*")
    assert (fields["CPUs/Task"], fields["AllocNode:Sid"]) == ("1", "localhost:28397")


def test_a_comment_that_looks_like_fields_does_not_hide_the_real_ones(fake: Fake) -> None:
    fake("scontrol", printing(RUNNING_ELEMENT))
    fields = slurm.job_fields("26_1")
    assert (fields["JobState"], fields["Restarts"]) == ("RUNNING", "0")
    assert fields["StdOut"] == "/shared/it's a b/26_1_0_log.out"
    assert (fields["ArrayJobId"], fields["WorkDir"]) == ("26", "/shared/it's a b")


def test_a_job_is_at_work_only_in_the_very_start_that_is_asked_for(fake: Fake) -> None:
    fake("scontrol", printing(RUNNING_ELEMENT))
    assert slurm.is_at_work("26_1", 0)
    assert not slurm.is_at_work("26_1", 1)
    fake("scontrol", printing(RUNNING_ELEMENT.replace("JobState=RUNNING", "JobState=COMPLETING")))
    assert slurm.is_at_work("26_1", 0), "its processes may still be there"
    fake("scontrol", printing(WAITING_JOB))
    assert not slurm.is_at_work("17", 0)


@pytest.mark.parametrize(
    "said", ["slurm_load_jobs error: Invalid job id specified", "scontrol: error: Invalid job id specified"]
)
def test_a_job_that_slurm_has_forgotten_has_no_fields_and_is_not_at_work(fake: Fake, said: str) -> None:
    fake("scontrol", f"echo '{said}' >&2; exit 1")
    assert slurm.job_fields("7") == {}
    assert not slurm.is_at_work("7", 0)


def test_partitions_are_found_by_name_or_as_the_default_one(fake: Fake) -> None:
    fake("scontrol", printing(PARTITIONS))
    assert slurm.partition(None)["PartitionName"] == "normal"
    fake("scontrol", f'[ "$4" = urgent ] || exit 9\n{printing(PARTITIONS.splitlines()[1])}')
    urgent = slurm.partition("urgent")
    assert (urgent["PartitionName"], urgent["GraceTime"], urgent["PreemptMode"]) == ("urgent", "0", "OFF")
    assert (urgent["Nodes"], urgent["TRES"]) == ("n[1-4]", "cpu=32,mem=16000M,node=4,billing=32")


def test_a_cluster_without_a_default_partition_wants_one_named(fake: Fake) -> None:
    fake("scontrol", printing(PARTITIONS.replace("Default=YES", "Default=NO")))
    with pytest.raises(SlurmError, match=r"no default partition; name one in the profile \(slurm.partition\)"):
        slurm.partition(None)


def test_the_configuration_keeps_equals_signs_in_values(fake: Fake) -> None:
    lines = "Configuration data as of 2026-11-23T09:04:30\nAuthInfo                = socket=/run/munge,cred_expire=5\n"
    lines += "KillWait                = 10 sec\nMaxArraySize            = 6\n\nSlurmctld(primary) at localhost is UP\n"
    fake("scontrol", printing(lines))
    found = slurm.configuration()
    assert found == {"AuthInfo": "socket=/run/munge,cred_expire=5", "KillWait": "10 sec", "MaxArraySize": "6"}


def test_of_the_queue_only_the_jobs_and_arrays_that_are_asked_for_are_shown(fake: Fake) -> None:
    fake("squeue", printing(QUEUE))
    found = slurm.queue(["26", "8"])
    assert [(job.job, job.array, job.state, job.nodes) for job in found] == [
        ("26_2", "26", "PENDING", ""),
        ("26_1", "26", "RUNNING", "n1"),
        ("8", "8", "PENDING", ""),
    ]
    assert found[2].reason == "ReqNodeNotAvail, UnavailableNodes:n[3-4]"
    assert (found[1].start, found[0].start) == ("2026-11-23T09:04:18", "N/A")


def test_where_no_jobs_are_asked_for_slurm_is_not_asked_at_all(fake: Fake) -> None:
    for name in ("squeue", "scancel", "sinfo"):
        fake(name, "exit 9")
    assert slurm.queue([]) == []
    assert slurm.broken_nodes("") == []
    slurm.cancel([])


@pytest.mark.parametrize(
    ("lines", "broken"),
    [
        ("n1 idle\nn1 idle\nn2 mixed", []),
        ("n1 down*\nn2 draining\nn3 drained\nn4 idle", ["n1", "n2", "n3"]),
        ("n2 failing\nn1 fail\nn3 allocated\nn3 allocated", ["n1", "n2"]),
        ("n1 unknown*\nn2 completing\nn3 idle~\nn4 powering_down", ["n1"]),
        ("", []),
    ],
)
def test_nodes_that_slurm_takes_for_down_or_failing_are_broken_and_no_others(
    fake: Fake, lines: str, broken: list[str]
) -> None:
    fake("sinfo", printing(lines))
    assert slurm.broken_nodes("n1,n2,n3,n4") == broken


def test_accounting_gives_states_without_who_cancelled(fake: Fake) -> None:
    fake("sacct", printing("12|COMPLETED\n13_0|TIMEOUT\n13_[1-3%1]|CANCELLED by 1000\n14|\n"))
    assert slurm.accounted(["12", "13", "14"]) == {"12": "COMPLETED", "13_0": "TIMEOUT", "13_[1-3%1]": "CANCELLED"}


@pytest.mark.parametrize("script", ["echo 'Slurm accounting storage is disabled' >&2; exit 1", "exit 1", ":"])
def test_without_accounting_nothing_is_known_and_nothing_fails(fake: Fake, script: str) -> None:
    fake("sacct", script)
    assert slurm.accounted(["12"]) == {}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'sbatch: error: no' >&2; echo 'sbatch: error: why' >&2; exit 1", "sbatch: error: no sbatch: error: why"),
        ("echo refused; exit 3", "refused"),
        ("printf '\\n\\n' >&2; exit 3", "exit code 3"),
        ("kill -9 $$", "exit code -9"),
        ("printf 'not \\377 UTF-8' >&2; exit 1", "not \ufffd UTF-8"),
    ],
)
def test_an_error_of_a_command_is_one_line_with_its_own_words(fake: Fake, script: str, said: str) -> None:
    fake("sbatch", script)
    with pytest.raises(SlurmError) as caught:
        slurm.command("sbatch", "--test-only", "script.sh")
    assert str(caught.value) == f"sbatch --test-only: {said}"


def test_what_a_command_prints_need_not_be_utf_8(fake: Fake) -> None:
    fake("squeue", "printf '7|RUNNING|na\\357ve|n1|N/A\\n'")
    assert [job.job for job in slurm.queue(["7"])] == ["7"]


def test_a_command_that_hangs_is_given_up(fake: Fake) -> None:
    fake("squeue", "exec sleep 60")
    with pytest.raises(SlurmError, match="^squeue: no answer in 0 s; is slurmctld up?"):
        slurm.command("squeue", timeout=0.2)


def test_a_command_that_is_missing_or_not_ours_to_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.is_there()
    with pytest.raises(SlurmError, match="^squeue: not found on PATH; is this machine part of a Slurm cluster"):
        slurm.command("squeue")
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    with pytest.raises(SlurmError, match="^squeue: "):
        slurm.command("squeue")


def test_a_machine_can_submit_where_sbatch_and_srun_are_programs(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    fake("sbatch", ":")
    assert not slurm.is_there()
    fake("srun", ":")
    assert slurm.is_there()
