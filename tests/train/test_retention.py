"""Which checkpoints stay and why, by the rules alone; and their deletion on a real disk, killed at every step."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import killed_at
from made_generations import EMBEDDING, made_manifest, make_generation

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import DiskError
from crystal_hpc.train import retention
from crystal_hpc.train.generations import (
    Generation,
    find_damage,
    generation_folder,
    generations,
    keep,
    mark_verified,
    remove_pending,
)
from crystal_hpc.train.manifest import Why
from crystal_hpc.train.retention import prune, reasons_to_keep
from crystal_hpc.train.state import Position

NOTE = {"time": 1.0, "by": "a test", "name": "x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def new(tiny_config: dict[str, Any], write_config: Callable[..., Path]) -> Callable[..., Run]:
    """A run of a phase `prose` of 100 steps and two more."""

    def make(keep_last: int = 2, **phase: Any) -> Run:
        first = tiny_config["phases"][0] | {"steps": 100, "checkpoint_every": 1} | phase
        phases = [first, *tiny_config["phases"][1:]]
        return load_run(write_config(tiny_config | {"phases": phases, "checkpoints": {"keep_last": keep_last}}))

    return make


def at(
    run: Run, step: int, why: Why = "periodic", verified: bool = False, name: str | None = None, phase: int = 0
) -> Generation:
    position = Position(phase, step)
    place = generation_folder(Path("/run"), run, position)
    kept = NOTE | {"name": name} if name else None
    return Generation(place, position, made_manifest(run, position, why=why), NOTE if verified else None, kept)


def reasons(run: Run, *found: Generation) -> dict[str, list[str]]:
    return {generation.label: reasons_to_keep(run, found)[generation.folder] for generation in found}


def test_without_generations_there_is_nothing_to_keep(new: Callable[..., Run]) -> None:
    assert reasons_to_keep(new(), []) == {}


def test_the_last_periodic_ones_stay_and_older_ones_may_go(new: Callable[..., Run]) -> None:
    run = new()
    assert reasons(run, *(at(run, step) for step in (10, 20, 30, 40))) == {
        "prose/10": [],
        "prose/20": [],
        "prose/30": ["last 2"],
        "prose/40": ["last 2", "newest"],
    }


def test_multiples_ends_of_phases_and_named_ones_stay_on_top_of_the_last(new: Callable[..., Run]) -> None:
    run = new(keep_every=50)
    found = [at(run, 10, name="before-lr-change"), at(run, 50), at(run, 70), at(run, 80), at(run, 90, name="b")]
    assert reasons(run, *found, at(run, 100, "phase end"), at(run, 2, phase=1)) == {
        "prose/10": ["named before-lr-change"],
        "prose/50": ["every 50 steps"],
        "prose/70": [],
        "prose/80": ["last 2"],
        "prose/90": ["named b"],
        "prose/100": ["end of phase", "every 50 steps"],
        "code/2": ["last 2", "newest"],
    }


def test_the_end_of_a_phase_stays_whatever_it_was_saved_for(new: Callable[..., Run]) -> None:
    run = new()
    said = reasons(run, at(run, 100, "preempted"), *(at(run, step, phase=1) for step in (1, 2, 3)))
    assert said["prose/100"] == ["end of phase"] and said["code/1"] == []


@pytest.mark.parametrize("why", ["preempted", "time limit"])
def test_saves_on_leaving_go_once_there_is_a_newer_one_and_take_no_place(new: Callable[..., Run], why: Why) -> None:
    run = new()
    found = [at(run, 10), at(run, 11, why), at(run, 20), at(run, 21, why), at(run, 22, why)]
    said = reasons(run, *found)
    assert said["prose/11"] == said["prose/21"] == [] and said["prose/22"] == ["newest"]
    assert said["prose/10"] == said["prose/20"] == ["last 2"]


def test_asked_for_saves_count_like_periodic_ones_unless_named(new: Callable[..., Run]) -> None:
    run = new()
    found = [at(run, 5, "asked for", name="mine"), at(run, 10, "asked for"), at(run, 20, "asked for"), at(run, 30)]
    said = reasons(run, *found)
    assert [said[f"prose/{step}"] for step in (5, 10, 20)] == [["named mine"], [], ["last 2"]]


def test_the_newest_verified_one_never_goes(new: Callable[..., Run]) -> None:
    run = new()
    rest = [at(run, step) for step in (30, 40, 50)]
    said = reasons(run, at(run, 20, "preempted", verified=True), *rest)
    assert said["prose/20"] == ["the only verified one"] and said["prose/30"] == []
    said = reasons(run, at(run, 10, verified=True), at(run, 20, "preempted", verified=True), *rest)
    assert said["prose/10"] == [] and said["prose/20"] == ["the newest verified one"]


def test_after_any_series_of_saves_the_run_can_go_on_and_little_is_left(new: Callable[..., Run]) -> None:
    run, chance = new(keep_last=3, keep_every=20), random.Random(3)
    for _ in range(50):
        found: list[Generation] = []
        newest_verified = None
        for step in range(1, 100):
            if chance.random() < 0.5:
                continue
            why = chance.choice(["periodic", "preempted", "time limit", "asked for"])
            found.append(at(run, step, why, verified=chance.random() < 0.2))
            newest_verified = found[-1] if found[-1].verified else newest_verified
            said = reasons_to_keep(run, found)
            found = [one for one in found if said[one.folder]]
            assert found[-1].position.step == step
            assert newest_verified is None or newest_verified in found
            multiples = [one for one in found if one.position.step % 20 == 0]
            assert len(found) - len(multiples) <= 3 + 1 + 1
            assert [one for one in found if one.manifest.why == "periodic"][-1:] == [
                one for one in found if one.manifest.why == "periodic" and said[one.folder]
            ][-1:]


def steps(folder: Path, run: Run) -> list[int]:
    return [one.position.step for one in generations(folder, run)]


def test_prune_deletes_what_may_go_and_tells_it(folder: Path, new: Callable[..., Run]) -> None:
    run, lines = new(), list[str]()
    for step in (10, 20, 30, 40):
        make_generation(folder, run, Position(0, step), "time limit" if step == 10 else "periodic")
    planned = prune(folder, run, dry_run=True, on_line=lines.append)
    assert [one.label for one in planned] == ["prose/10", "prose/20"] and steps(folder, run) == [10, 20, 30, 40]
    assert lines[0].startswith("would delete prose/10 (time limit, ") and lines[0].endswith(" kB)")
    assert prune(folder, run, on_line=lines.append) == planned and lines[-1].startswith("deleted prose/20 (periodic")
    assert sorted(path.name for path in (folder / "checkpoints/prose").iterdir()) == ["step_00000030", "step_00000040"]
    assert prune(folder, run) == []


def test_damaged_linked_and_foreign_folders_are_left_alone(folder: Path, new: Callable[..., Run]) -> None:
    run = new(keep_last=1)
    places = {step: make_generation(folder, run, Position(0, step)) for step in (10, 20, 30, 40)}
    (places[10] / "manifest.json").unlink()
    places[20].rename(folder / "elsewhere")
    places[20].symlink_to(folder / "elsewhere")
    own = places[30].with_name("mine")
    own.mkdir()
    assert [one.position.step for one in prune(folder, run)] == [30]
    assert places[10].exists() and (folder / "elsewhere/manifest.json").exists() and own.exists()


def test_a_name_given_in_the_last_moment_still_keeps(
    folder: Path, new: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(keep_last=1)
    first = make_generation(folder, run, Position(0, 10))
    make_generation(folder, run, Position(0, 20))
    real = retention._still_safe
    monkeypatch.setattr(retention, "_still_safe", lambda found: (keep(first, "mine"), real(found))[1])
    assert prune(folder, run) == [] and steps(folder, run) == [10, 20]


@pytest.mark.parametrize("lost", [20, 30])
def test_nothing_goes_once_the_newest_or_the_verified_one_is_lost(
    folder: Path, new: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    run = new(keep_last=1)
    places = {step: make_generation(folder, run, Position(0, step)) for step in (5, 10, 20, 30)}
    mark_verified(places[20], "a test")
    real = retention._still_safe

    def late(found: list[Generation]) -> bool:
        if places[lost].exists():
            places[lost].rename(folder / "lost")
        return real(found)

    monkeypatch.setattr(retention, "_still_safe", late)
    assert prune(folder, run) == [] and places[10].exists() and places[5].exists()


def test_two_prunes_at_once_do_not_disturb_each_other(
    folder: Path, new: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(keep_last=1)
    for step in (5, 10, 20, 30):
        make_generation(folder, run, Position(0, step))
    real, other = retention._delete, list[Generation]()

    def slow(place: Path) -> bool:
        monkeypatch.setattr(retention, "_delete", real)
        other.extend(prune(folder, run))
        return real(place)

    monkeypatch.setattr(retention, "_delete", slow)
    assert prune(folder, run) == [] and [one.position.step for one in other] == [5, 10, 20]
    assert steps(folder, run) == [30]


def test_a_read_only_disk_is_one_clear_error(small_disk: Path, new: Callable[..., Run]) -> None:
    run = new(keep_last=1)
    for step in (10, 20):
        make_generation(small_disk, run, Position(0, step), made={EMBEDDING: torch.ones(4, 2)})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(DiskError, match=r"step_00000010: the file system is read-only"):
        prune(small_disk, run)
    assert steps(small_disk, run) == [10, 20]


def test_what_an_earlier_deletion_left_and_cannot_be_removed_is_one_clear_error(
    folder: Path, new: Callable[..., Run]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a folder that is in use needs root and mount")
    run = new(keep_last=1)
    for step in (10, 20):
        make_generation(folder, run, Position(0, step))
    busy = folder / "checkpoints/prose/step_00000010.pruned/busy"
    busy.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", busy], check=True)
    try:
        with pytest.raises(DiskError, match=r"step_00000010\.pruned: cannot be emptied; delete it yourself"):
            prune(folder, run)
    finally:
        subprocess.run(["umount", busy], check=True)
    assert steps(folder, run) == [10, 20]
    assert [one.position.step for one in prune(folder, run)] == [10]


def test_a_prune_killed_at_any_step_leaves_only_whole_generations(folder: Path, new: Callable[..., Run]) -> None:
    run, moment = new(keep_last=1), 1

    def fill() -> None:
        for step in (10, 20, 30):
            if not generation_folder(folder, run, Position(0, step)).exists():
                make_generation(folder, run, Position(0, step), verified=step == 10)

    fill()
    while killed_at(moment, lambda: prune(folder, run)):
        found = generations(folder, run)
        assert [one.position.step for one in found] in ([10, 20, 30], [10, 30])
        assert all(find_damage(one.folder, one.manifest) == [] for one in found)
        if moment % 2:  # prune alone clears its own remains where it comes to them
            remove_pending(folder)
        prune(folder, run)
        remove_pending(folder)
        names = sorted(path.name for path in (folder / "checkpoints/prose").iterdir())
        assert names == ["step_00000010", "step_00000030"]
        fill()
        moment += 1
    assert moment > 8
