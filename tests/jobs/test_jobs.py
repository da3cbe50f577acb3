"""The job's journey, told with real processes: submitit's local executor, two ranks, real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from crystal_hpc import files
from crystal_hpc.config.load import load_cluster, load_run
from crystal_hpc.errors import RunError
from crystal_hpc.jobs import journal, submit
from crystal_hpc.jobs.status import cancel, describe_status, log_lines
from crystal_hpc.report.html import write_report
from crystal_hpc.report.ledger import check_ledger

PATIENCE = 240


@pytest.fixture
def long_config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """The tiny run with a second phase long enough to be caught in."""
    first, second, third = tiny_config["phases"]
    phases = [first, {**second, "steps": 60, "checkpoint_every": 20}, third]
    return {**tiny_config, "parallel": {"micro_batch": 2, "distributed_optimizer": True}, "phases": phases}


@pytest.fixture
def started(
    tmp_path: Path, long_config: dict[str, Any], write_config: Callable[..., Path], cluster_file: Path
) -> Iterator[Callable[[], tuple[Path, Any]]]:
    """Starts, or takes up again, the run; whatever still runs at the end of the test is killed."""
    folders = []

    def start() -> tuple[Path, Any]:
        cluster = load_cluster(cluster_file)
        folder = submit.prepare(load_run(write_config(long_config)), cluster, tmp_path / "runs")
        folders.append(folder)
        return folder, submit.start(folder, cluster)

    yield start
    for folder in folders:
        for pid in ranks_of(folder):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the newest attempt that still runs."""
    running = [entry for entry in journal.read_attempts(folder) if entry["outcome"] is None]
    return [int(pid) for pid in running[-1]["pids"].values()] if running else []


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition; fails the test after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {PATIENCE} s in vain for {what}")


def wait_for_step(folder: Path, phase: str, step: int) -> None:
    def reached() -> bool:
        line = files.last_line(folder / "metrics.jsonl")
        return line is not None and (line["phase"], line["step"] >= step) == (phase, True)

    wait_for(reached, f"step {step} of {phase}")
    wait_for(lambda: len(ranks_of(folder)) == 2, "both ranks in the journal")


def finish(folder: Path, job: Any, since: int = 0) -> list[dict[str, Any]]:
    """Waits for the job; returns all attempts."""
    lines: list[str] = []
    submit.follow(folder, job, since, lines.append)
    assert lines
    return journal.read_attempts(folder)


def test_a_run_told_that_time_is_up_saves_is_requeued_and_finishes_without_losing_a_sample(
    started: Callable[[], tuple[Path, Any]],
) -> None:
    folder, job = started()
    wait_for_step(folder, "code", 10)
    os.kill(ranks_of(folder)[1], signal.SIGUSR2)  # one rank is enough: all agree
    first, second = finish(folder, job)
    assert (first["outcome"], second["outcome"]) == ("time_limit", "finished")
    assert (first["signal"], 0 < first["signal_to_durable"] < 30) == ("SIGUSR2", True)
    assert second["first_step"]["step"] == first["last_step"]["step"] + 1 == first["last_checkpoint"]["step"]
    assert second["redone_steps"] == 0
    assert first["backend"].startswith("CPU rig: fp32; layers megatron, norms torch, attention unfused")
    log = next((folder / "logs").glob("*_0_log.out")).read_text()
    assert f"computing on {first['backend']}" in log
    assert "68 steps, 544 samples: each read once, as planned; no step done twice" in check_ledger(folder)
    assert "100.0% of" in describe_status(folder)
    assert submit.is_finished(folder)
    assert write_report(folder).stat().st_size > 10_000


def test_a_preempted_run_saves_and_leaves_and_the_same_command_takes_it_up_again(
    started: Callable[[], tuple[Path, Any]],
) -> None:
    folder, job = started()
    wait_for_step(folder, "code", 5)
    for pid in ranks_of(folder):
        os.kill(pid, signal.SIGTERM)
    (first,) = finish(folder, job)
    assert (first["outcome"], first["signal"]) == ("preempted", "SIGTERM")
    _, again = started()
    _, second = finish(folder, again, since=1)
    assert second["outcome"] == "finished"
    assert "no step done twice" in check_ledger(folder)


def test_a_signal_before_the_imports_are_done_is_neither_lost_nor_fatal(
    started: Callable[[], tuple[Path, Any]],
) -> None:
    folder, job = started()
    controller = psutil.Process(int(job[0].job_id))
    ranks = wait_for(lambda: controller.children() if len(controller.children()) == 2 else None, "two ranks")
    # At once: Python itself is still starting, torch and Megatron take seconds more.
    for rank in ranks:
        rank.send_signal(signal.SIGUSR2)
    attempts = finish(folder, job)
    assert [entry["outcome"] for entry in attempts] == ["time_limit", "finished"]
    assert attempts[0]["last_step"] is None


def test_a_killed_rank_ends_the_attempt_and_the_next_one_goes_on_from_the_last_checkpoint(
    started: Callable[[], tuple[Path, Any]],
) -> None:
    folder, job = started()
    wait_for_step(folder, "code", 25)
    os.kill(ranks_of(folder)[0], signal.SIGKILL)
    (first,) = finish(folder, job)
    assert first["outcome"] == "node_failure"
    assert first["last_checkpoint"]["step"] >= 20
    _, again = started()
    _, second = finish(folder, again, since=1)
    assert second["outcome"] == "finished"
    assert second["first_step"]["step"] == first["last_checkpoint"]["step"]
    assert second["redone_steps"] > 0
    assert "done twice after a crash" in check_ledger(folder)


def test_a_running_run_is_cancelled_after_saving_and_cannot_be_started_twice(
    started: Callable[[], tuple[Path, Any]],
) -> None:
    folder, job = started()
    wait_for_step(folder, "code", 2)
    with pytest.raises(RunError, match="is at work on this run"):
        started()
    assert "told job" in cancel(folder)
    (entry,) = finish(folder, job)
    assert entry["outcome"] == "cancelled"
    assert entry["last_checkpoint"]["step"] == entry["last_step"]["step"] + 1
    assert cancel(folder).endswith("no job is running")


def test_an_error_in_a_job_is_told_in_one_line_in_the_journal_and_in_full_in_the_log(
    started: Callable[[], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = started()
    # The store is exchanged between submission and start, as a careless colleague would.
    plan = files.read_json(folder / "plan.json")
    plan["sources"]["code"]["digest"] = "0" * 32
    files.write_json(folder / "plan.json", plan)
    (entry,) = finish(folder, job)
    assert entry["outcome"] == "code_error"
    assert "is not the store that this run was begun with" in entry["reason"]
    assert any("is not the store" in line for line in log_lines(folder, 0, 60, follow=False))


def test_a_run_whose_checkpoints_are_gone_is_an_error_and_no_fresh_start(
    started: Callable[[], tuple[Path, Any]],
) -> None:
    folder, job = started()
    wait_for_step(folder, "code", 2)
    cancel(folder)
    finish(folder, job)
    (folder / "checkpoints").rename(folder / "moved-by-a-colleague")
    _, again = started()
    _, second = finish(folder, again, since=1)
    assert second["outcome"] == "code_error"
    assert "saved checkpoints (the last: code" in second["reason"]
    assert "none is there; bring them back" in second["reason"]


def test_a_disk_that_fills_up_stops_the_run_with_that_reason_and_loses_nothing(
    long_config: dict[str, Any], write_config: Callable[..., Path], cluster_file: Path, small_disk: Path
) -> None:
    run, cluster = load_run(write_config(long_config)), load_cluster(cluster_file)
    subprocess.run(["mount", "-o", "remount,size=1500k", small_disk], check=True)  # room for two checkpoints, not three
    folder = submit.prepare(run, cluster, small_disk / "runs")
    (first,) = finish(folder, submit.start(folder, cluster))
    assert (first["outcome"], "free some" in first["reason"]) == ("code_error", True), first["reason"]
    kept = first["last_checkpoint"]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    _, second = finish(folder, submit.start(folder, cluster), since=1)
    assert (second["outcome"], second["first_step"]["phase"]) == ("finished", kept["phase"])
    assert "68 steps, 544 samples: each read once, as planned" in check_ledger(folder)


def test_the_command_line_runs_a_job_and_survives_ctrl_c(
    tmp_path: Path, long_config: dict[str, Any], write_config: Callable[..., Path], cluster_file: Path
) -> None:
    words = [sys.executable, "-m", "crystal_hpc.cli", "submit", str(write_config(long_config))]
    words += ["--cluster", str(cluster_file), "--runs", str(tmp_path / "runs"), "--wait"]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder = tmp_path / "runs" / "tiny"
    wait_for_step(folder, "code", 2)
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    command.communicate(timeout=PATIENCE)
    wait_for(lambda: journal.read_attempts(folder)[0]["outcome"], "the job to finish on its own")
    assert journal.read_attempts(folder)[0]["outcome"] == "finished"
