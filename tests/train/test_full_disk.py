"""A disk that is full: noticed before a save, or in the middle of one. A small file system holds the checkpoints."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import breaking
import pytest
from rig import LOG, SHORT, Ended, generation, run_ranks, short_run, state_saved, steps_saved, train, values

from crystal_hpc.errors import DiskError
from crystal_hpc.train import checkpoint, retention

ROOM = 1 << 20  # a generation of the short run takes half of it


@pytest.fixture
def disk(small_disk: Path) -> Path:
    subprocess.run(["mount", "-o", f"remount,size={ROOM * 4}", small_disk], check=True)
    (small_disk / "checkpoints").mkdir()
    return small_disk


@pytest.fixture
def folder(new_run: Callable[..., Path], disk: Path) -> Path:
    """A short run, not begun, with its checkpoints on the small disk."""
    made = new_run("on-a-small-disk", *SHORT)
    (made / "checkpoints").rmdir() if (made / "checkpoints").exists() else None
    (made / "checkpoints").symlink_to(disk / "checkpoints")
    return made


def attempt(folder: Path, prepare: Callable[..., None] | None = None, *more: Any) -> Ended:
    (ended,) = run_ranks(train, 1, folder, [], prepare, *more)
    return ended


def assert_refused(ended: Ended, said: str) -> None:
    assert isinstance(ended.error, DiskError) and said in str(ended.error) and "\n" not in str(ended.error)


def losses(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("forecast", [True, False])
def test_training_goes_on_through_two_saves_without_room_and_ends_at_the_third(
    folder: Path, disk: Path, forecast: bool
) -> None:
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text().replace("steps: 4", "steps: 9"))
    breaking.fill(disk, leave=200_000)
    ended = attempt(folder, None if forecast else breaking.no_forecast)
    assert_refused(ended, "a checkpoint needs 5" if forecast else "the disk is full; free some space")
    # Known before the first byte: found out at the end of step 3. Else when the fourth is about to begin, or earlier.
    assert losses(folder) in ((3,) if forecast else (3, 4))
    assert (folder / LOG).read_text().count("training goes on without it") == 2
    assert steps_saved(folder) == [], "what was half written is taken away"


def filled_for_a_while(job: Any, disk: Path, forecast: bool) -> None:
    if not forecast:
        breaking.no_forecast(job)
    breaking.fill(disk, leave=200_000)
    breaking.at_step(job, 3, (disk / "filler").unlink)


@pytest.mark.parametrize("forecast", [True, False])
def test_a_run_that_gets_room_again_ends_bit_equal(
    folder: Path, disk: Path, new_run: Callable[..., Path], forecast: bool
) -> None:
    ended = attempt(folder, filled_for_a_while, disk, forecast)
    assert ended.error is None and steps_saved(folder)[-1] == "prose/step_00000004"
    assert state_saved(generation(folder, 4)) == state_saved(generation(short_run(new_run), 4))


def slow_deletions(_job: Any, disk: Path) -> None:
    real = retention._delete

    def delete(folder: Path) -> bool:
        time.sleep(0.3)
        return real(folder)

    retention._delete = delete
    breaking.fill(disk, leave=1_600_000)


def test_a_save_waits_for_the_room_that_deletions_make(folder: Path, disk: Path) -> None:
    text = (folder / "run.yaml").read_text().replace("keep_last: 9", "keep_last: 1")
    (folder / "run.yaml").write_text(text)
    assert attempt(folder, slow_deletions, disk).error is None
    assert "training goes on without it" not in (folder / LOG).read_text()
    lines = (folder / "saves.jsonl").read_text().splitlines()
    assert len(lines) == 4, "none was left out"


def preempted_on_a_full_disk(job: Any, disk: Path, forecast: bool) -> None:
    if not forecast:
        breaking.no_forecast(job)
    saver = checkpoint.Saver.begin

    def begin(self: Any, position: Any) -> Any:  # the first save goes well before the disk is full
        saver(self, position)
        durable = self.finish()
        breaking.fill(disk, leave=200_000)
        return durable

    checkpoint.Saver.begin = begin
    breaking.stop_in_step(job, 2, "PREEMPTED")


@pytest.mark.parametrize("forecast", [True, False])
def test_a_save_on_preemption_without_room_is_an_error_and_leaves_the_one_before(
    folder: Path, disk: Path, new_run: Callable[..., Path], forecast: bool
) -> None:
    ended = attempt(folder, preempted_on_a_full_disk, disk, forecast)
    assert_refused(ended, "the disk is too full" if forecast else "the disk is full")
    assert steps_saved(folder) == ["prose/step_00000001"]
    (disk / "filler").unlink()
    (rest,) = values(run_ranks(train, 1, folder))
    assert rest.began == (0, 1)
    assert state_saved(generation(folder, 4)) == state_saved(generation(short_run(new_run), 4))


def test_a_save_that_was_asked_for_and_has_no_room_is_not_tried_again_at_every_step(folder: Path, disk: Path) -> None:
    (folder / "save").write_text("too much")
    text = (folder / "run.yaml").read_text().replace("checkpoint_every: 1", "checkpoint_every: null")
    (folder / "run.yaml").write_text(text)
    breaking.fill(disk, leave=200_000)
    ended = attempt(folder)
    assert_refused(ended, "the disk is too full")
    assert losses(folder) == 4, "the end of the phase is the first save that has to be"
    assert not (folder / "save").exists()


def no_room_for_a_name(job: Any, disk: Path) -> None:
    real = checkpoint.files.commit_folder

    def commit(pending: Path, final: Path) -> None:
        real(pending, final)
        if final.name == "step_00000001":
            breaking.fill(disk)

    checkpoint.files.commit_folder = commit
    breaking.at_step(job, 3, (disk / "filler").unlink)


def test_a_save_that_only_lacks_room_for_its_name_counts(folder: Path, disk: Path) -> None:
    (folder / "save").write_text("a name")
    assert attempt(folder, no_room_for_a_name, disk).error is None
    assert "prose/step_00000001" in steps_saved(folder) and not (generation(folder, 1) / "kept.json").exists()
    assert not (folder / "save").exists()
