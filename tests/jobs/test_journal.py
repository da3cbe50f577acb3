"""The journal: attempts recorded once, closed once, and settled when their processes are gone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crystal_hpc import files
from crystal_hpc.jobs import journal
from crystal_hpc.jobs.place import Place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "attempts").mkdir()
    return tmp_path


def place(job: str, rank: int = 0, ranks: int = 1) -> Place:
    return Place("local", job, 0, rank, ranks, rank, None, "127.0.0.1")


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_attempts_are_numbered_from_one_and_say_where_they_ran(folder: Path) -> None:
    first = journal.open_attempt(folder, place("7", ranks=2), None)
    journal.close(folder, first, "preempted", "told to leave")
    second = journal.open_attempt(folder, place("8", ranks=2), None)
    read = journal.read_attempts(folder)
    assert [(entry["attempt"], entry["job"], entry["outcome"]) for entry in read] == [
        (1, "7", "preempted"),
        (2, "8", None),
    ]
    assert second["versions"]["megatron-core"] and second["host"] and second["pids"] == {"0": os.getpid()}


def test_an_attempt_whose_process_is_gone_is_closed_as_a_node_failure(folder: Path) -> None:
    entry = journal.open_attempt(folder, place("7"), None)
    journal.update(folder, entry, pids={"0": gone()})
    journal.settle(folder)
    (settled,) = journal.read_attempts(folder)
    assert (settled["outcome"], "vanished" in settled["reason"]) == ("node_failure", True)


def test_an_attempt_that_runs_is_left_open(folder: Path) -> None:
    journal.open_attempt(folder, place("7"), None)
    journal.settle(folder)
    assert journal.read_attempts(folder)[0]["outcome"] is None


def test_the_rank_that_failed_first_gives_the_cause(folder: Path) -> None:
    entry = journal.open_attempt(folder, place("7", ranks=3), None)
    journal.note_error(folder, place("7", 2), "out_of_memory", "no memory")
    time.sleep(0.01)
    journal.note_error(folder, place("7"), "code_error", "connection lost")
    journal.update(folder, entry, pids={"0": gone()})
    journal.settle(folder)
    (settled,) = journal.read_attempts(folder)
    assert (settled["outcome"], settled["reason"]) == ("out_of_memory", "rank 2: no memory")


def test_the_rank_that_says_it_hangs_only_after_the_others_have_given_up_is_the_one_that_hangs(folder: Path) -> None:
    entry = {"job": "7", "launch": 0, "nodes": ["n1", "n1", "n2", "n3"]}
    for rank in range(3):
        journal.note_error(folder, place("7", rank), "node_failure", "no sign of life", hang=True)
    late = folder / "attempts" / "7.0.rank2.error.json"
    files.write_json(late, {**files.read_json(late), "time": time.time() + 6})
    assert journal.silent_nodes(folder, entry) == ["n2", "n3"]


def test_a_new_attempt_settles_the_one_before(folder: Path) -> None:
    entry = journal.open_attempt(folder, place("7"), None)
    journal.update(folder, entry, pids={"0": gone()})
    journal.open_attempt(folder, place("8"), None)
    assert [entry["outcome"] for entry in journal.read_attempts(folder)] == ["node_failure", None]
