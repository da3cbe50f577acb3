"""The chain of jobs on a real Slurm: phases, slices, side jobs; by hand and from Python; stopped and taken up again."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster
from stories import Story, wait_for

from crystal_hpc import files, load_cluster, load_run
from crystal_hpc import submit as submit_run
from crystal_hpc.config.schema import Cluster
from crystal_hpc.drill.compare import differences
from crystal_hpc.jobs import journal, queueing, slurm, submit, submitted
from crystal_hpc.jobs.status import cancel, describe_status, log_lines
from crystal_hpc.report.ledger import check_ledger

ROOT = Path(__file__).parents[2]
Profile = Callable[..., Cluster]
MakeStory = Callable[..., Story]


def test_three_phases_with_staging_and_evaluation_are_one_chain_from_python(
    devcluster: DevCluster, profile: Profile, story: MakeStory, tmp_path: Path
) -> None:
    side = {"stage": {"time_limit": "5min"}, "evaluate": {"time_limit": "5min", "ranks": 2}}
    cluster = profile(slurm={"resume_by": "slices", "slices": 4, **side})
    whole = story(cluster)
    jobs = submit_run(load_run(whole.folder / "run.yaml"), load_cluster(tmp_path / "cluster.yaml"), tmp_path / "runs")
    assert len(jobs) == 3 * (1 + 4 + 1), "a job of submitit's for each stage, slice and evaluation"
    whole.wait_until_over()
    assert whole.outcomes() == ["finished"] * 3, "no slice was left to begin after its phase was done"
    assert submit.is_finished(whole.folder)
    kinds = [(job["kind"], job["phase"]) for job in submitted.read_jobs(whole.folder)]
    assert kinds == [
        (kind, name) for name in ("prose", "code", "adaptation") for kind in ("stage", "train", "evaluate")
    ]
    for phase in ("prose", "code", "adaptation"):
        assert files.read_json(whole.folder / "staged" / f"{phase}.json")["digests"].keys() <= {"prose", "code"}
        assert files.read_json(whole.folder / "evals" / f"{phase}.json")["losses"]["held-out"] > 0
    assert jobs[1].results() == ["finished"] * 2, "of the first slice, on each rank"
    assert submit_run(load_run(whole.folder / "run.yaml"), cluster, tmp_path / "runs") == [], "nothing is left to do"


def test_a_script_submitted_by_hand_is_told_that_time_is_up_requeued_and_ends_bit_equal(
    devcluster: DevCluster, undisturbed: Path, long_config: dict[str, Any], write_config: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in (
        ("CRYSTAL_PYTHON", sys.executable),
        ("CRYSTAL_RUNS", tmp_path / "my runs"),
        ("OMP_NUM_THREADS", 1),
    ):
        monkeypatch.setenv(name, str(value))
    words = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/batch.out", "--parsable"]
    script = [ROOT / "slurm" / "train.sbatch", write_config(long_config)]
    done = subprocess.run(["sbatch", *words, *script], cwd=ROOT, capture_output=True, text=True, check=True)
    folder = tmp_path / "my runs" / "tiny"

    def in_the_second_phase() -> bool:
        line = files.last_line(folder / "metrics.jsonl")
        return line is not None and line["phase"] == "code" and line["step"] > 10

    wait_for(in_the_second_phase, "the second phase")
    slurm.tell(done.stdout.strip(), "USR2")
    wait_for(lambda: not slurm.queue({done.stdout.strip()}), "the job to leave the queue")
    attempts = journal.read_attempts(folder)
    assert [entry["outcome"] for entry in attempts] == ["time_limit", "finished"], (tmp_path / "batch.out").read_text()
    assert (attempts[1]["launch"], attempts[1]["redone_steps"]) == (1, 0)
    assert differences(folder, undisturbed) == []


def test_three_nodes_of_two_ranks_lose_one_and_go_on_with_the_fourth(
    devcluster: DevCluster, profile: Profile, story: MakeStory, tiny_config: dict[str, Any]
) -> None:
    # Without GPUs: slurmctld 22.05 miscounts those of a job that it starts again in the moment a node goes down.
    cluster = profile(nodes=3, ranks_per_node=2, slurm={"gpus": False})
    parallel = {"micro_batch": 1, "distributed_optimizer": True}
    phase = {**tiny_config["phases"][1], "steps": 200, "batch_size": 12, "checkpoint_every": 20}
    whole = story(cluster, parallel=parallel, phases=[phase], evaluation={"rows": 12})
    whole.start()
    entry = whole.wait_for_step("code", 20)
    assert sorted(entry["nodes"]) == sorted(2 * sorted(set(entry["nodes"]))) and len(set(entry["nodes"])) == 3
    lost = entry["nodes"][-1]
    devcluster.kill_node(lost, with_tasks=True)
    try:
        whole.wait_until_over()
    finally:
        devcluster.start_node(lost)
    first, last = whole.attempts()[0], whole.attempts()[-1]
    assert (first["outcome"], last["outcome"]) == ("node_failure", "finished")
    assert last["redone_steps"] > 0 and lost not in last["nodes"]
    assert "200 steps" in check_ledger(whole.folder)


def test_a_node_that_failed_twice_is_left_out(
    devcluster: DevCluster, profile: Profile, story: MakeStory, tiny_config: dict[str, Any]
) -> None:
    whole = story(profile(nodes=1), phases=[{**tiny_config["phases"][0], "steps": 400}])
    whole.start()
    blamed = []
    for _ in range(2):
        entry = whole.wait_for_step("prose", 1)
        blamed.append(entry["nodes"][0])
        os.kill(int(entry["pids"]["0"]), 9)
        wait_for(lambda e=entry: whole.attempts()[e["attempt"] - 1]["blamed"], "the node to be blamed")
    assert [entry["blamed"] for entry in whole.attempts()[:2]] == [[node] for node in blamed] == [["n1"], ["n1"]]
    job = submitted.read_jobs(whole.folder)[0]["id"]
    wait_for(lambda: slurm.job_fields(job).get("ExcNodeList") == "n1", "the node to be left out")
    assert whole.wait_for_step("prose", 1)["nodes"] == ["n2"]


def test_a_run_without_progress_stops_with_a_report_and_resumes_when_told(
    devcluster: DevCluster, profile: Profile, story: MakeStory
) -> None:
    # A hidden fault: the stores' files are there when the run is submitted, and cannot be read when it starts.
    whole = story(profile(nodes=1))
    (whole.folder / "checkpoints" / "prose").mkdir(parents=True)
    broken = whole.folder / "checkpoints" / "prose" / "step_00000005.pending"
    broken.write_text("a file where a folder must be")
    whole.start()
    whole.wait_until_over()
    stopped = files.read_json(whole.folder / "stopped.json")
    assert len(stopped["attempts"]) == len(whole.attempts()) <= 3
    assert set(whole.outcomes()) == {"code_error"}
    assert "stopped: " in describe_status(whole.folder)
    assert submitted.queued(whole.folder) == []
    broken.unlink()
    _, cluster = submit.reopen(whole.folder, None)
    submit.start(whole.folder, cluster)
    whole.wait_until_over()
    assert submit.is_finished(whole.folder)
    assert not (whole.folder / "stopped.json").exists()


def test_a_save_that_takes_longer_than_slurm_gives_is_warned_of(
    devcluster: DevCluster, profile: Profile, story: MakeStory
) -> None:
    whole = story(profile())
    assert queueing.warnings(whole.folder, whole.cluster) == [], "nothing has been measured yet"
    files.write_json(whole.folder / "attempts" / "0001.json", {"signal_to_durable": 40.0})
    late, preempted = queueing.warnings(whole.folder, whole.cluster)
    assert "needed up to 40 s, more than signal_delay: 30s" in late
    assert "more than partition normal gives on preemption (GraceTime 15 s + KillWait 10 s)" in preempted


def test_a_cancelled_chain_saves_leaves_the_queue_and_is_taken_up_again(
    devcluster: DevCluster, undisturbed: Path, profile: Profile, story: MakeStory
) -> None:
    whole = story(profile())
    whole.start()
    whole.wait_for_step("code", 12)
    assert "to save and leave" in cancel(whole.folder)
    whole.wait_until_over()
    last = whole.attempts()[-1]
    assert (last["outcome"], last["signal"]) == ("cancelled", "SIGTERM")
    assert last["last_checkpoint"]["step"] == last["last_step"]["step"] + 1
    assert any("saved step" in line for line in log_lines(whole.folder, 0, 40, follow=False))
    assert queueing.warnings(whole.folder, whole.cluster) == [], "it saved in time"
    _, cluster = submit.reopen(whole.folder, None)
    submit.start(whole.folder, cluster)
    whole.wait_until_over()
    assert whole.outcomes() == ["finished", "cancelled", "finished", "finished"]
    assert differences(whole.folder, undisturbed) == []


def test_an_attempt_that_slurm_gave_up_for_lost_touches_nothing_once_the_next_has_begun(
    devcluster: DevCluster, undisturbed: Path, profile: Profile, story: MakeStory
) -> None:
    whole = story(profile(nodes=1), phases=load_run(undisturbed / "run.yaml").model_dump(mode="json")["phases"])
    whole.start()
    entry = whole.wait_for_step("code", 5)
    # What the next attempt does first; the job of this one knows nothing of it.
    later = {**entry, "attempt": entry["attempt"] + 1, "job": "999999", "outcome": "preempted", "reason": "not real"}
    files.write_json(journal.attempt_path(whole.folder, later["attempt"]), later)
    wait_for(lambda: "this one, given up for lost, leaves" in whole.log(), "the attempt to notice")
    wait_for(lambda: len(whole.attempts()) > 3 or not submitted.queued(whole.folder), "its job to end")
    assert journal.read_attempts(whole.folder)[later["attempt"] - 1]["reason"] == "not real"
