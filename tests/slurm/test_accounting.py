"""Where sacct answers, and where it does not: the same, but for what `crystal status` says of jobs that ended."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devcluster import ACCOUNT, DevCluster
from stories import Story, wait_for

from crystal_hpc.config.schema import Cluster
from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import slurm, submit, submitted
from crystal_hpc.jobs.status import cancel, describe_status

Profile = Callable[..., Cluster]
MakeStory = Callable[..., Story]


def status(*words: Path | str) -> str:
    """What `crystal status` prints."""
    command = [sys.executable, "-m", "crystal_hpc.cli", "status", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def of_jobs(text: str) -> dict[str, str]:
    """Phase of each job that a status shows, and what it says of it."""
    return {match[2]: match[3] for match in re.finditer(r"^  job (\d+) +train +(\S+) +(.*)$", text, re.M)}


@pytest.fixture
def short(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """What makes of the long run the tiny one, with three phases of a few steps."""
    return {"parallel": tiny_config["parallel"], "phases": tiny_config["phases"]}


def test_a_chain_of_three_phases_finishes_and_its_status_says_how_each_job_ended(
    accounted: DevCluster, profile: Profile, story: MakeStory, short: dict[str, Any]
) -> None:
    whole = story(profile(nodes=1, slurm={"account": ACCOUNT}), **short)
    jobs = [job.job_id for job in whole.start()]
    whole.wait_until_over()
    assert whole.outcomes() == ["finished"] * 3, whole.log()
    assert submit.is_finished(whole.folder)
    wait_for(lambda: set(slurm.accounted(jobs).values()) == {"COMPLETED"}, "accounting to have all three")
    text = status(whole.folder)
    assert text.startswith("tiny: 100.0% of ")
    assert of_jobs(text) == {"prose": "completed", "code": "completed", "adaptation": "completed"}
    assert text.count(" finished ") == 3
    (line,) = status("--runs", whole.folder.parent).splitlines()
    assert line.split() == [str(whole.folder), "100.0%", "3", "attempts", "finished"]


def test_slices_of_which_some_were_not_needed_are_shown_as_what_they_were(
    accounted: DevCluster, profile: Profile, story: MakeStory, short: dict[str, Any]
) -> None:
    cluster = profile(nodes=1, slurm={"account": ACCOUNT, "resume_by": "slices", "slices": 3})
    whole = story(cluster, **{**short, "phases": short["phases"][:1]})
    job = whole.start()[0].job_id.partition("_")[0]
    whole.wait_until_over()
    wait_for(lambda: "CANCELLED" in slurm.accounted([job]).values(), "accounting to have the slices that were left")
    assert slurm.accounted([job])[f"{job}_0"] == "COMPLETED"
    assert of_jobs(status(whole.folder)) == {"prose": "completed, cancelled"}


def test_the_last_slice_goes_back_to_the_queue_alone(
    accounted: DevCluster, profile: Profile, story: MakeStory, short: dict[str, Any]
) -> None:
    cluster = profile(nodes=1, slurm={"account": ACCOUNT, "resume_by": "slices", "slices": 2})
    whole = story(cluster, **{**short, "phases": [{**short["phases"][0], "steps": 150}]})
    array = whole.start()[0].job_id.partition("_")[0]
    for step in (2, 40):
        entry = whole.wait_for_step("prose", step)
        slurm.tell(entry["job"], "USR2")
        wait_for(lambda e=entry: whole.attempts()[e["attempt"] - 1]["outcome"], "the attempt to end")
    whole.wait_until_over()
    starts = [(entry["job"], entry["launch"], entry["outcome"]) for entry in whole.attempts()]
    # Slurm gives the last element to start the id of the whole array: all of it must not be requeued.
    last = f"{array}_1"
    assert starts == [(f"{array}_0", 0, "time_limit"), (last, 0, "time_limit"), (last, 1, "finished")]


def test_status_is_the_same_with_and_without_accounting_but_for_jobs_that_are_over(
    accounted: DevCluster, _four_nodes: DevCluster, profile: Profile, story: MakeStory, short: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    texts = {}
    for name, cluster in (("with", accounted), ("without", _four_nodes)):
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        account = {"account": ACCOUNT} if name == "with" else {}
        whole = story(profile(slurm={**account, "options": {"hold": True}}), name=name, **short)
        jobs = [job.job_id for job in whole.start()]
        waiting = dict.fromkeys(("prose", "code", "adaptation"), "pending (JobHeldUser)")
        assert of_jobs(describe_status(whole.folder)) == waiting
        assert "3 jobs" in cancel(whole.folder)
        assert submitted.queued(whole.folder) == []
        if name == "with":
            wait_for(lambda ids=jobs: len(slurm.accounted(ids)) == 3, "accounting to have the jobs")
            assert set(slurm.accounted(jobs).values()) == {"CANCELLED"}
        else:
            assert slurm.accounted(jobs) == {}
        texts[name] = status(whole.folder)
    assert of_jobs(texts["with"]) == dict.fromkeys(("prose", "code", "adaptation"), "cancelled")
    assert of_jobs(texts["without"]) == {}
    common = [line for line in texts["with"].splitlines()[1:] if not line.startswith("  job ")]
    assert common == texts["without"].splitlines()[1:] and len(common) == 3
    lines = status("--runs", whole.folder.parent).splitlines()
    assert [line.split()[0] for line in lines] == [str(whole.folder.parent / name) for name in ("with", "without")]
    assert all(line.endswith("0 attempts  not begun") for line in lines)


def test_a_folder_without_runs_has_no_status(accounted: DevCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crystal_hpc.cli", "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: runs: no runs there; ")


def test_what_slurm_says_against_a_job_in_its_queue_is_an_error_of_ours(accounted: DevCluster) -> None:
    assert slurm.job_fields("999999") == {}
    with pytest.raises(SlurmError, match=r"^scontrol requeue: .*Invalid job id"):
        slurm.requeue("999999")
    with pytest.raises(SlurmError, match="nowhere"):
        slurm.partition("nowhere")


def test_jobs_are_found_by_who_we_are_not_by_what_a_variable_says(
    accounted: DevCluster, profile: Profile, story: MakeStory, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = story(profile(slurm={"account": ACCOUNT, "options": {"hold": True}}), **short)
    jobs = [job.job_id for job in whole.start()]
    for name in ("LOGNAME", "USER"):  # as after `su` without a login
        monkeypatch.setenv(name, "nobody")
    assert sorted(queued.job for queued in submitted.queued(whole.folder)) == jobs
