"""Ranks that hang, in Python and in C; and ranks that only are slow. Real processes, which would otherwise sleep long.

The shortest patience, and the moment that others get, are made small: seconds in a cluster are hundredths here.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from crystal_hpc.train import watchdog
from crystal_hpc.train.watchdog import EXIT_CODE, Watchdog

BY_FAULTHANDLER = 1
LONG = 60  # seconds: nobody here waits so long, unless the watchdog fails

PROGRAM = """\
import ctypes, sys, time
from pathlib import Path
from crystal_hpc.train import watchdog

watchdog.SHORTEST_PATIENCE = {shortest}
watchdog.MOMENT = 0.1
folder = Path(sys.argv[1])

def on_hang(reason):
    (folder / "hang").write_text(reason)

def hangs_in_python():
    time.sleep({long})

def hangs_in_c():
    ctypes.PyDLL(None).sleep({long})  # holds Python's lock, unlike CDLL

dog = watchdog.Watchdog(folder / "rank0.stacks", {limit}, on_hang)
{body}
dog.stop()
print("lived")
"""


def run(folder: Path, body: str, limit: float, shortest: float = 0.3) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(body=body, limit=limit, shortest=shortest, long=LONG)
    words = [sys.executable, "-c", program, folder]
    return subprocess.run(words, capture_output=True, text=True, timeout=LONG / 2)


def test_a_process_that_stops_giving_signs_of_life_leaves_its_stacks_and_word_of_it_and_ends(tmp_path: Path) -> None:
    done = run(tmp_path, "dog.beat('saving')\nhangs_in_python()", limit=0.3)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODE, "", "")
    said = (tmp_path / "hang").read_text()
    assert said.startswith("no sign of life for ") and said.endswith(" while saving; stacks in rank0.stacks")
    stacks = (tmp_path / "rank0.stacks").read_text()
    assert "in hangs_in_python" in stacks and "in _watch" in stacks, "of all threads"


def test_a_process_that_never_begins_is_ended_too(tmp_path: Path) -> None:
    done = run(tmp_path, "hangs_in_python()", limit=0.3)
    assert done.returncode == EXIT_CODE
    assert " while starting; " in (tmp_path / "hang").read_text()


def test_a_process_that_hangs_in_c_with_pythons_lock_is_ended_by_faulthandler(tmp_path: Path) -> None:
    done = run(tmp_path, "dog.beat('a collective')\nhangs_in_c()", limit=1)
    assert (done.returncode, done.stdout) == (BY_FAULTHANDLER, "")
    assert "in hangs_in_c" in (tmp_path / "rank0.stacks").read_text()
    assert not (tmp_path / "hang").exists(), "the thread could not run"


def test_a_process_in_c_that_only_takes_its_time_lives(tmp_path: Path) -> None:
    done = run(tmp_path, "ctypes.PyDLL(None).usleep(300_000)\ndog.beat('a step')", limit=2)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr


def test_a_process_that_gives_signs_of_life_lives_however_long_and_leaves_no_file(tmp_path: Path) -> None:
    done = run(tmp_path, "for _ in range(20):\n    dog.beat('a step', step=True)\n    time.sleep(0.1)", limit=1)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_after_quick_steps_one_that_hangs_is_noticed_long_before_the_limit(tmp_path: Path) -> None:
    steps = "for step in range(5):\n    dog.beat(f'step {step}', step=True)\n    time.sleep(0.01)\n"
    done = run(tmp_path, steps + "dog.beat('step 5', step=True)\nhangs_in_python()", limit=LONG)
    assert done.returncode == EXIT_CODE
    assert " while step " in (tmp_path / "hang").read_text()


def test_after_quick_steps_what_is_no_step_has_the_whole_limit_again(tmp_path: Path) -> None:
    steps = "for step in range(5):\n    dog.beat(f'step {step}', step=True)\n    time.sleep(0.01)\n"
    # More than twice what a step would be given.
    done = run(tmp_path, steps + "dog.beat('saving')\ntime.sleep(2)", limit=LONG, shortest=0.8)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr


def test_steps_that_are_slow_by_nature_are_given_time_but_never_more_than_the_limit(tmp_path: Path) -> None:
    slow = "for step in range(2):\n    dog.beat(f'step {step}', step=True)\n    time.sleep(0.2)\n"
    # Twenty times 0.2 s: such a step may last a second. With a limit of half a second, it may not.
    for limit, expected in ((LONG, 0), (0.5, EXIT_CODE)):
        done = run(tmp_path, slow + "dog.beat('step 2', step=True)\ntime.sleep(1)", limit, shortest=0.1)
        assert done.returncode == expected, done.stderr


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the watchdog takes for the time, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("durations", "patience"),
    [
        ([], 900.0),
        ([1.0], 60.0),
        ([5.0], 100.0),
        ([5.0, 20.0, 1.0], 400.0),
        ([50.0], 900.0),
    ],
)
def test_patience_is_twenty_times_the_slowest_step_but_a_minute_at_least_and_the_limit_at_most(
    tmp_path: Path, clock: list[float], durations: list[float], patience: float
) -> None:
    dog = Watchdog(tmp_path / "stacks", 900.0, pytest.fail)
    try:
        clock[0] += 700.0  # starting; no step, and not measured
        dog.beat("step", step=True)
        for duration in durations:
            clock[0] += duration
            dog.beat("step", step=True)
        assert dog._patience == patience
        clock[0] += 50.0  # a step that something else comes after: not measured
        dog.beat("saving")
        assert dog._patience == 900.0
        clock[0] += 850.0  # nor is a save
        dog.beat("step", step=True)
        assert dog._patience == patience
    finally:
        dog.stop()


def test_stopping_removes_a_file_without_stacks_and_keeps_one_that_has_them(tmp_path: Path) -> None:
    for text in ("", "a stack"):
        path = tmp_path / "rank0.stacks"
        dog = Watchdog(path, 900.0, pytest.fail)
        assert path.exists()
        path.write_text(text)
        dog.stop()
        assert path.exists() == bool(text)


def test_stopping_is_possible_though_the_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    dog = Watchdog(tmp_path / "logs" / "rank0.stacks", 900.0, pytest.fail)
    (tmp_path / "logs").rename(tmp_path / "moved")
    dog.stop()
