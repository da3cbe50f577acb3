"""A save that is killed at any instant leaves either nothing that counts or all of it.

Real processes that die of SIGKILL; the next start loads a complete generation and ends where a run ends that nothing
happened to.
"""

import random
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import killing
import pytest
from rig import branch, generation, run_ranks, short_run, state_saved, steps_saved, train, values

from crystal_hpc.train.manifest import read_manifest

ASYNCHRONOUS, SYNCHRONOUS = "checkpoints.asynchronous=true", "checkpoints.asynchronous=false"
MOMENTS = 20
ALL = [f"prose/step_{step:08d}" for step in (1, 2, 3, 4)]


Case = tuple[str, str, Callable[..., None], Any, int]
"""Name of a folder, override, how to die, at what, and which rank."""


def kill_all(cases: Iterable[Case], origin: Path, tmp_path: Path, size: int) -> list[int]:
    """Each case goes on after step 1 and is killed in the save after step 2; returns where the next starts began."""

    def kill(case: Case) -> int:
        name, override, how, at, victim = case
        folder = branch(origin, tmp_path / name, 1)
        killed = run_ranks(train, size, folder, [override], how, at, victim)
        assert killed[victim].code == -signal.SIGKILL, f"{name}: it did not die of it ({killed[victim].error})"
        return go_on(name, folder)

    def go_on(name: str, folder: Path) -> int:
        found = values(run_ranks(train, size, folder, [SYNCHRONOUS]))[0]
        assert found.began in ((0, 1), (0, 2)), f"{name}: nothing but the first save was killed"
        assert steps_saved(folder) == ALL and not (folder / "quarantine").exists(), name
        for step in (1, 2, 3, 4):
            seen = state_saved(generation(folder, step))
            assert seen == state_saved(generation(origin, step)), f"{name}: another state after step {step}"
        began: int = found.began[1]
        return began

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(kill, cases))


def moments(origin: Path, tmp_path: Path, override: str, size: int, victim: int, count: int) -> Iterator[int]:
    """One moment at random in each of so many equal parts of a save, by its lines."""
    folder = branch(origin, tmp_path / "counted", 1)
    values(run_ranks(train, size, folder, [override], killing.die_at_line, 0, victim))
    lines = int((folder / "lines").read_text())
    assert lines > 20 * count
    chance = random.Random(5)
    for part in range(count):
        yield chance.randint(part * lines // count + 1, (part + 1) * lines // count)


@pytest.mark.parametrize("override", [SYNCHRONOUS, ASYNCHRONOUS])
def test_a_save_killed_at_twenty_random_moments_is_all_there_or_not_at_all(
    new_run: Callable[..., Path], tmp_path: Path, override: str
) -> None:
    origin = short_run(new_run)
    chosen = moments(origin, tmp_path, override, 1, 0, MOMENTS)
    cases = [(f"line-{at}", override, killing.die_at_line, at, 0) for at in chosen]
    began = kill_all(cases, origin, tmp_path, 1)
    assert began[0] == 1, "the first of them died before the save could count"


@pytest.mark.parametrize("override", [SYNCHRONOUS, ASYNCHRONOUS])
def test_a_save_killed_at_a_named_point_is_all_there_or_not_at_all(
    new_run: Callable[..., Path], tmp_path: Path, override: str
) -> None:
    cases = [(point.replace(" ", "-"), override, killing.die_at_point, point, 0) for point in killing.POINTS]
    began = kill_all(cases, short_run(new_run), tmp_path, 1)
    assert dict(zip(killing.POINTS, began, strict=True)) == dict.fromkeys(killing.POINTS, 1) | {"after the rename": 2}


def test_one_of_two_ranks_killed_in_a_save_leaves_all_of_it_or_nothing(
    new_run: Callable[..., Path], tmp_path: Path
) -> None:
    origin = short_run(new_run, 2)
    chosen = list(moments(origin, tmp_path, ASYNCHRONOUS, 2, 1, 6))
    cases = [(f"line-{at}", ASYNCHRONOUS, killing.die_at_line, at, 1) for at in chosen]
    for override, points, victim in (
        (SYNCHRONOUS, killing.OF_ANY_RANK, 1),
        (ASYNCHRONOUS, killing.OF_ANY_RANK, 1),
        (ASYNCHRONOUS, killing.OF_RANK_0, 0),
    ):
        how = override.rpartition("=")[2]
        for point in points:
            cases.append((f"{point}-{how}-{victim}".replace(" ", "-"), override, killing.die_at_point, point, victim))
    began = kill_all(cases, origin, tmp_path, 2)
    assert sum(began) >= len(cases), began


def test_a_killed_save_leaves_a_manifest_only_in_what_counts(new_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "cut", 1)
    run_ranks(train, 1, folder, [SYNCHRONOUS], killing.die_at_point, "before the manifest", 0)
    assert steps_saved(folder) == ["prose/step_00000001", "prose/step_00000002.pending"]
    with pytest.raises(Exception, match="no checkpoint, or its saving was cut short"):
        read_manifest(generation(folder, 2).with_name("step_00000002.pending"))
