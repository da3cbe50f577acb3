"""What Slurm, or we, refuse: one line of error, exit code 2, and a queue as it was; and what must not be refused.

Every command runs in a process of its own, on the private Slurm, from a folder in which no file `x` may ever appear:
names and values here try to have a shell make one. Jobs are submitted on hold (`--hold`) where they need not run.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster
from stories import Story, wait_for

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Cluster
from crystal_hpc.errors import ConfigError, RunError
from crystal_hpc.jobs import journal, slurm, submitted
from crystal_hpc.jobs.place import Place

Done = subprocess.CompletedProcess[str]
Profile = Callable[..., Cluster]
MakeStory = Callable[..., Story]
Submit = Callable[..., Done]

HELD = {"options": {"hold": True}}
HOSTILE = 'it\'s  a "b" $(touch x) `touch x` ; touch x # & * ~ !! {a,b} [c] ü山 JobState=PENDING Restarts=7'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which commands and jobs run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def short_config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """One phase of five steps, nothing to evaluate."""
    data = {**tiny_config["data"], "held_out": {}}
    return {**tiny_config, "parallel": {"micro_batch": 1}, "data": data, "phases": tiny_config["phases"][:1]}


@pytest.fixture
def submit_config(tmp_path: Path, write_config: Callable[..., Path]) -> Submit:
    """`crystal submit` of a config, to the profile that was made last."""

    def run(config: dict[str, Any], runs: Path | str = "runs", **environment: str) -> Done:
        words = ["submit", str(write_config(config)), "--cluster", str(tmp_path / "cluster.yaml"), "--runs", str(runs)]
        return crystal(*words, **environment)

    return run


def crystal(*words: Path | str, **environment: str) -> Done:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "crystal_hpc.cli", *map(str, words)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def refused(done: Done, *parts: str) -> None:
    """Exit code 2, one line and no more, all parts in it, and nothing in the queue."""
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert queue() == []


def accepted(done: Done) -> list[str]:
    """Ids of the jobs that were submitted."""
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    words = done.stdout.splitlines()[0].partition(" for ")[0].split()[2:]
    return [word.rstrip(",") for word in words]


def queue() -> list[str]:
    """What squeue shows, of whomever; elements of arrays one by one."""
    return slurm.command("squeue", "--noheader", "--array", "--format", "%i").split()


def fake(name: str, folder: Path, script: str) -> str:
    """A program that stands before the real one; returns the PATH by which it is found."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# --- What Slurm refuses is told in its own words, before anything is queued.


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"slurm": {"partition": "nowhere"}}, "invalid partition specified: nowhere"),
        ({"nodes": 8}, "Requested node configuration is not available"),
        ({"slurm": {"constraint": "purple"}}, "Invalid feature specification"),
        ({"slurm": {"memory": "9T"}}, "node configuration is not available"),
        ({"ranks_per_node": 4}, "node configuration is not available"),
        ({"slurm": {"exclude": ["n9"]}}, "Invalid node name specified"),
        ({"slurm": {"options": {"nosuch": "1"}}}, "unrecognized option '--nosuch=1'"),
        ({"slurm": {"evaluate": {"time_limit": "5min", "partition": "nowhere"}}}, "invalid partition"),
    ],
    ids=["partition", "nodes", "constraint", "memory", "gpus", "node", "option", "partition-of-a-side-job"],
)
def test_what_the_cluster_does_not_have_is_refused_before_anything_is_queued(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, tiny_config: dict[str, Any],
    keys: dict[str, Any], expected: str,
) -> None:  # fmt: skip
    profile(**keys)
    refused(submit_config({**tiny_config, "parallel": {"micro_batch": 1}}), "sbatch", expected)


def test_an_account_that_does_not_exist_is_refused(
    accounted: DevCluster, profile: Profile, submit_config: Submit, short_config: dict[str, Any]
) -> None:
    profile(slurm={"account": "nobody"})
    refused(submit_config(short_config), "Invalid account")


def test_a_machine_without_slurm_is_told_what_to_do_instead(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, short_config: dict[str, Any], tmp_path: Path
) -> None:
    profile()
    refused(submit_config(short_config, PATH=str(tmp_path)), "sbatch: not found", "login node", "executor: local")


def test_a_controller_that_does_not_answer_is_an_error_in_its_own_words(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, short_config: dict[str, Any], tmp_path: Path
) -> None:
    profile()
    said = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)"
    path = fake("scontrol", tmp_path / "bin", f"echo '{said}' >&2; exit 1")
    refused(submit_config(short_config, PATH=path), f"scontrol show: {said}")


# --- Time.


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"time_limit": "20s"}, "signal_delay: 30s leaves nothing of the time limit of 20s"),
        ({"time_limit": "30s"}, "signal_delay: 30s leaves nothing of the time limit of 30s"),
        *(
            ({"slurm": {kind: {"time_limit": "30s"}}}, f"slurm.{kind}.time_limit: 30s is not longer than signal_delay")
            for kind in ("stage", "evaluate")
        ),
    ],
)
def test_a_time_limit_that_is_over_before_the_signal_is_refused(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, short_config: dict[str, Any],
    keys: dict[str, Any], said: str,
) -> None:  # fmt: skip
    with contextlib.suppress(ConfigError):
        profile(**keys)  # writes the file, then reads it
    refused(submit_config(short_config), "cluster.yaml", said)


def test_a_time_limit_in_which_the_measured_save_leaves_no_time_to_train_is_refused(
    devcluster: DevCluster, profile: Profile, story: MakeStory, submit_config: Submit, short_config: dict[str, Any]
) -> None:
    whole = story(profile(time_limit="5min", slurm=HELD), **short_config)
    entry = journal.open_attempt(whole.folder, Place("slurm", "999999", 0, 0, 1, 0, "n1", ""), None)
    journal.close(whole.folder, entry, "time_limit", "time was nearly up", signal_to_durable=270.4)
    said = "time_limit: 300s is not longer than signal_delay (30s) and a save (270 s, as measured)"
    refused(submit_config(short_config), "cluster dev: ", said)
    profile(time_limit="6min", slurm=HELD)
    done = submit_config(short_config)
    warning = "warning: from signal to durable checkpoint this run has needed up to 270 s, more than "
    assert (done.returncode, done.stderr.count(warning), len(done.stderr.splitlines())) == (0, 2, 2), done.stderr


# --- A chain is queued whole, or not at all; once, and not twice.


def test_slices_beyond_the_longest_array_become_several_arrays_and_all_can_be_cancelled(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    profile(nodes=1, slurm={"resume_by": "slices", "slices": 14, **HELD})
    ids = accepted(submit_config({**tiny_config, "phases": tiny_config["phases"][:2]}))
    elements = [[job for job in queue() if job.partition("_")[0] == one] for one in ids]
    assert [len(of_array) for of_array in elements] == [6, 6, 2, 6, 6, 2]
    waits = [slurm.job_fields(one)["Dependency"] for one in ids]
    assert waits == ["(null)", *(f"afterany:{before}_*(unfulfilled)" for before in ids[:-1])]
    jobs = submitted.read_jobs(tmp_path / "runs" / "tiny")
    assert [(job["id"], job["slices"]) for job in jobs] == list(zip(ids, (6, 6, 2, 6, 6, 2), strict=True))
    done = crystal("cancel", tmp_path / "runs" / "tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert queue() == []


LIMIT = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"
TWO_PASS = f"""\
case " $* " in *" --test-only "*) exec /usr/bin/sbatch "$@" ;; esac
if [ -e "$0.2" ]; then
    echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2
    echo '{LIMIT}' >&2
    exit 1
fi
if [ -e "$0.1" ]; then touch "$0.2"; else touch "$0.1"; fi
exec /usr/bin/sbatch "$@"
"""


def test_a_chain_of_which_slurm_refuses_the_last_job_leaves_nothing_in_the_queue_and_can_be_submitted_again(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    profile(nodes=1, slurm=HELD)
    path = fake("sbatch", tmp_path / "bin", TWO_PASS)
    refused(submit_config(tiny_config, PATH=path), "QOSMaxSubmitJobPerUserLimit", LIMIT)
    assert len(submitted.read_jobs(tmp_path / "runs" / "tiny")) == 2, "two were queued, and taken back"
    assert len(accepted(submit_config(tiny_config))) == 3


def test_a_first_job_that_runs_already_is_taken_back_too(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    profile(nodes=1)
    slow = TWO_PASS.replace("echo 'sbatch: error: QOS", "sleep 2; echo 'sbatch: error: QOS")
    done = submit_config(tiny_config, PATH=fake("sbatch", tmp_path / "bin", slow))
    assert (done.returncode, done.stdout) == (2, "")
    wait_for(lambda: queue() == [], "the first job to end")


def test_jobs_that_could_not_be_taken_back_are_named(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    profile(nodes=1, slurm=HELD)
    path = fake("sbatch", tmp_path / "bin", TWO_PASS)
    fake("scancel", tmp_path / "bin", "echo 'scancel: error: Unable to contact slurm controller' >&2; exit 1")
    done = submit_config(tiny_config, PATH=path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    ids = queue()
    assert len(ids) == 2
    for part in (LIMIT, "Unable to contact slurm controller", *ids, "crystal cancel"):
        assert part in done.stderr
    assert crystal("cancel", tmp_path / "runs" / "tiny").returncode == 0
    assert queue() == []


def test_a_run_that_is_queued_cannot_be_submitted_again(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, short_config: dict[str, Any], tmp_path: Path
) -> None:
    profile(slurm=HELD)
    (first,) = accepted(submit_config(short_config))
    for done in (submit_config(short_config), crystal("resume", tmp_path / "runs" / "tiny")):
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"job {first} is at work on this run, or queued" in done.stderr
    assert queue() == [first]


def test_of_two_commands_at_once_one_submits_and_the_other_is_refused(
    devcluster: DevCluster, profile: Profile, tiny_config: dict[str, Any], write_config: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    profile(nodes=1, slurm=HELD)
    words = [sys.executable, "-m", "crystal_hpc.cli", "submit", write_config(tiny_config)]
    words += ["--cluster", tmp_path / "cluster.yaml", "--runs", tmp_path / "runs"]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted((one.communicate(timeout=60)[1], one.returncode) for one in both)
    assert said[0] == ("", 0)
    assert (said[1][1], len(said[1][0].splitlines())) == (2, 1), said
    assert "another command just now" in said[1][0] or "is at work on this run, or queued" in said[1][0]
    assert len(queue()) == 3


def test_a_command_that_looked_before_another_submitted_does_not_submit_a_second_chain(
    devcluster: DevCluster, profile: Profile, story: MakeStory, short_config: dict[str, Any]
) -> None:
    first, second = (story(profile(slurm=HELD), **short_config) for _ in range(2))
    (job,) = first.start()
    with pytest.raises(RunError, match=f"job {job.job_id} is at work on this run, or queued"):
        second.start()
    assert queue() == [job.job_id]


# --- Names and values that would mean something to a shell, to sbatch, or to those who read what scontrol shows.


def test_hostile_folders_and_values_reach_slurm_as_they_are_and_the_run_recovers_and_finishes(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, short_config: dict[str, Any], tmp_path: Path
) -> None:
    comment, value = f"{HOSTILE} \\ %j", f"{HOSTILE} \\ %j\ntouch x\n"
    # What is exported to the ranks is seen at the end of the script that starts them.
    setup = ['trap \'printf %s "$VALUE" > seen; printf %s "$OTHER" >> seen\' EXIT']
    options = {"setup": setup, "network": {"OTHER": HOSTILE}, "options": {"comment": comment}}
    profile(nodes=1, environment={"OMP_NUM_THREADS": "1", "VALUE": value}, slurm=options)
    config = {**short_config, "phases": [{**short_config["phases"][0], "steps": 60}]}
    (job,) = accepted(submit_config(config, tmp_path / HOSTILE / "-n"))
    folder = tmp_path / HOSTILE / "-n" / "tiny"
    (entry,) = wait_for(lambda: [one for one in journal.read_attempts(folder) if one["first_step"]], "a first step")
    assert slurm.is_at_work(job, 0), "though comment and folders say JobState=PENDING, Restarts=7"
    # To blame the node, the script has to find its own log; to go on, it has to know its own job's state.
    os.kill(entry["pids"]["0"], 9)
    wait_for(lambda: queue() == [], "the job to end")
    first, second = journal.read_attempts(folder)
    assert (first["outcome"], first["blamed"]) == ("node_failure", entry["nodes"]), first["reason"]
    assert (second["outcome"], second["launch"]) == ("finished", 1)
    fields = slurm.job_fields(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert f"Comment={comment} " in slurm.command("scontrol", "--oneliner", "show", "job", job)
    assert (tmp_path / "seen").read_text() == value + HOSTILE
    assert list(tmp_path.rglob("x")) == []
    assert "60 / 60 steps" in crystal("status", folder).stdout


@pytest.mark.parametrize("name", ["a\nb", "50%", "a\\b", "tab\there", "\x7f", "line\u2028separator"], ids=ascii)
def test_folders_that_slurm_would_read_as_something_else_are_refused(
    devcluster: DevCluster, profile: Profile, submit_config: Submit, short_config: dict[str, Any], tmp_path: Path,
    name: str,
) -> None:  # fmt: skip
    profile()
    refused(submit_config(short_config, tmp_path / name), repr(str(tmp_path / name / "tiny")), "choose another folder")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "name",
    ["", "../up", "a/b", "a b", "-rf", ".", "$(touch x)", "a;b", "a'b", "tiny\n", "50%", "ü", "x" * 65],
    ids=ascii,
)
@pytest.mark.parametrize("where", ["run", "phase"])
def test_hostile_names_of_runs_and_phases_are_refused_by_the_config(
    short_config: dict[str, Any], write_config: Callable[..., Path], where: str, name: str
) -> None:
    phases = [{**short_config["phases"][0], "name": name}] if where == "phase" else short_config["phases"]
    config = write_config({**short_config, "phases": phases, "name": name if where == "run" else "tiny"})
    with pytest.raises(ConfigError) as caught:
        load_run(config)
    (line,) = str(caught.value).splitlines()
    assert ("phases.0.name" if where == "phase" else ": name") in line


# --- Pickles are code: a job runs only what none but its user could have put there.


class Trap:
    """Unpickled, it leaves a file where the process runs."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


TAMPERINGS = ["logs", "runs", "pickle", "given away"]


def tamper(how: str, pickle_file: Path) -> Path:
    """Lets others write to one of the folders, or to the pickle, or makes it theirs; returns what was changed."""
    logs = pickle_file.parent
    path = {"logs": logs, "runs": logs.parents[1]}.get(how, pickle_file)
    path.chmod({"pickle": 0o664, "given away": 0o644}.get(how, 0o777))
    if how == "given away":
        os.chown(path, 65534, 65534)
    return path


@pytest.mark.parametrize("how", TAMPERINGS)
def test_a_job_whose_pickle_another_could_have_written_is_refused_before_it_is_unpickled(
    devcluster: DevCluster, profile: Profile, story: MakeStory, tmp_path: Path, how: str
) -> None:
    whole = story(profile(nodes=1, slurm=HELD))
    jobs = [job.job_id for job in whole.start()]
    pickle_file = whole.folder / "logs" / f"{jobs[0]}_submitted.pkl"
    pickle_file.write_bytes(pickle.dumps(Trap()))
    named = tamper(how, pickle_file)
    slurm.command("scontrol", "release", *jobs)
    wait_for(lambda: queue() == [], "the job to be refused, and those that wait for it to go")
    errors = [line for line in whole.log().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {named}: "), whole.log()
    assert "as code" in errors[0] and "Traceback" not in whole.log()
    assert slurm.job_fields(jobs[0])["JobState"] == "FAILED"
    assert whole.attempts() == []
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("how", [None, *TAMPERINGS])
def test_a_rank_looks_for_itself_before_it_unpickles(tmp_path: Path, how: str | None) -> None:
    logs = tmp_path / "runs" / "tiny" / "logs"
    logs.mkdir(parents=True)
    pickle_file = logs / "7_submitted.pkl"
    pickle_file.write_bytes(pickle.dumps(Trap()))
    local = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_GLOBALID": "0", "LOCAL_NTASKS": "1"}
    environment = {**os.environ, **{f"SUBMITIT_{name}": value for name, value in local.items()}}
    named = tamper(how, pickle_file) if how else None
    words = [sys.executable, "-m", "crystal_hpc.jobs.rank", logs]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert (tmp_path / "unpickled").exists() == (how is None), "the trap works, and is not stepped into"
    if how:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert done.stderr.startswith(f"error: {named}: ")
