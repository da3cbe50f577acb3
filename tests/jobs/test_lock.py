"""Two jobs never train one run at once, and no job that is gone keeps another from it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit

from crystal_hpc import files
from crystal_hpc.config.load import load_cluster, load_run
from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import journal, lock, slurm, submit
from crystal_hpc.jobs.place import Place
from crystal_hpc.jobs.request import local_parameters
from crystal_hpc.jobs.task import TrainTask
from crystal_hpc.report.ledger import check_ledger

HOLDER = """
import sys, time
from pathlib import Path
from crystal_hpc.jobs import lock
from crystal_hpc.jobs.place import Place
held = lock.take(Path(sys.argv[1]), Place(sys.argv[2], sys.argv[3], int(sys.argv[4]), 0, 1, 0, None, ""), 0)
print("held", flush=True)
time.sleep(60)
"""


def place(job: str = "2", launch: int = 0, executor: Any = "local") -> Place:
    return Place(executor, job, launch, 0, 1, 0, None, "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return files.make_folder(tmp_path / "run" / "attempts").parent


@pytest.fixture
def hold(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts another process that holds the run."""
    started = []

    def start(executor: str = "local", job: str = "1", launch: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(folder), executor, job, str(launch)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout and started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_job_is_refused_and_told_who_has_the_run(
    folder: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = hold()
    with pytest.raises(lock.RunIsTaken, match=rf"job 1 \(process {holder.pid} on .*\) is at work .* crystal cancel"):
        lock.take(folder, place(), patience=0)


def test_a_job_that_was_killed_holds_nothing(folder: Path, hold: Callable[..., subprocess.Popen[str]]) -> None:
    holder = hold()
    holder.kill()
    holder.wait()
    lock.take(folder, place(), patience=0).close()


def test_a_job_waits_for_one_that_is_just_leaving(folder: Path, hold: Callable[..., subprocess.Popen[str]]) -> None:
    holder = hold()
    with subprocess.Popen(["sh", "-c", f"sleep 1; kill {holder.pid}"]):
        lock.take(folder, place(), patience=20).close()


def test_a_process_that_outlives_its_parent_holds_nothing(folder: Path) -> None:
    held = lock.take(folder, place("1"), patience=0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 1)
        held.close()  # as the kernel does when the parent dies
        lock.take(folder, place("2"), patience=0).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_file_in_which_nothing_can_be_read_is_no_obstacle(folder: Path) -> None:
    (folder / "attempts" / lock.LOCK).write_bytes(b'{"exec\xff')
    lock.take(folder, place(), patience=0).close()
    assert json.loads((folder / "attempts" / lock.LOCK).read_text())["job"] == "2"


def test_a_job_that_slurm_has_started_again_takes_the_run_from_its_earlier_start(
    folder: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    hold(executor="slurm", job="7")
    held = lock.take(folder, place("7", 1, "slurm"), patience=0)
    with pytest.raises(lock.RunIsTaken, match="job 7"):
        lock.take(folder, place("8"), patience=0)
    held.close()


@pytest.mark.parametrize("at_work", [True, False, None])
def test_of_another_job_slurm_says_whether_it_still_has_the_run(
    folder: Path, hold: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, at_work: bool | None
) -> None:
    def answer(_job: str, _launch: int) -> bool:
        if at_work is None:
            raise SlurmError("no answer")
        return at_work

    monkeypatch.setattr(slurm, "is_at_work", answer)
    hold(executor="slurm", job="7")
    if at_work is False:
        lock.take(folder, place("8", 0, "slurm"), patience=0).close()
    else:
        with pytest.raises(lock.RunIsTaken):
            lock.take(folder, place("8", 0, "slurm"), patience=0)


def test_of_two_jobs_started_in_the_same_moment_one_trains_and_the_other_leaves_no_trace(
    tmp_path: Path,
    tiny_config: dict[str, Any],
    write_config: Callable[..., Path],
    cluster_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = load_cluster(cluster_file)
    folder = submit.prepare(load_run(write_config(tiny_config)), cluster, tmp_path / "runs")
    executor = submitit.LocalExecutor(folder / "logs")
    executor.update_parameters(**local_parameters(cluster))
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CRYSTAL_LOCK_PATIENCE", "0.5")
    jobs = [executor.submit(TrainTask(folder)) for _ in range(2)]
    for job in jobs:
        job.wait()
    ends = sorted(str(job.exception()) if job.exception() else "finished" for job in jobs)
    assert "is at work on this run" in ends[0] + ends[1]
    assert "finished" in ends
    (attempt,) = journal.read_attempts(folder)
    assert attempt["outcome"] == "finished"
    assert "12 steps, 96 samples: each read once, as planned; no step done twice" in check_ledger(folder)
