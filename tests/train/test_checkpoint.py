"""Which generation a new attempt starts from, and what is refused. Real files, whose bytes do not matter here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.checkpoint import generation_folder, generations, latest
from crystal_hpc.train.state import Position


@pytest.fixture
def folder(new_run: Callable[..., Path]) -> Path:
    return new_run("generations")


@pytest.fixture
def run(folder: Path) -> Run:
    return load_run(folder / "run.yaml")


def make_generation(folder: Path, run: Run, position: Position) -> Path:
    place = generation_folder(folder, run, position)
    place.mkdir(parents=True)
    (place / "__0_0.distcp").write_bytes(b"x" * 100)
    manifest = {
        "digest": derive.run_digest(run),
        **position.named(run),
        "layout": run.parallel.model_dump(),
        "files": {"__0_0.distcp": {"bytes": 100}},
    }
    files.write_json(place / "manifest.json", manifest)
    return place


def test_a_run_without_checkpoints_has_none(folder: Path, run: Run) -> None:
    assert latest(folder, run) is None


def test_the_generation_furthest_along_in_the_latest_phase_is_taken(folder: Path, run: Run) -> None:
    for position in (Position(0, 5), Position(1, 2), Position(0, 3)):
        make_generation(folder, run, position)
    found = latest(folder, run)
    assert found is not None and found.position == Position(1, 2)
    assert [one.position for one in generations(folder, run)] == [Position(0, 3), Position(0, 5), Position(1, 2)]


def test_a_save_that_was_cut_short_does_not_count(folder: Path, run: Run) -> None:
    make_generation(folder, run, Position(0, 3))
    place = make_generation(folder, run, Position(0, 5))
    place.rename(place.with_name(place.name + ".pending"))
    make_generation(folder, run, Position(1, 2)).joinpath("manifest.json").unlink()
    found = latest(folder, run)
    assert found is not None and found.position == Position(0, 3)


@pytest.mark.parametrize(("damage", "said"), [("missing", "is missing"), ("cut", "has 60 bytes, not 100")])
def test_a_generation_with_a_missing_or_shortened_file_is_refused_with_the_remedy(
    folder: Path, run: Run, damage: str, said: str
) -> None:
    data = make_generation(folder, run, Position(0, 3)) / "__0_0.distcp"
    data.unlink() if damage == "missing" else data.write_bytes(b"x" * 60)
    with pytest.raises(CheckpointError, match=f"{said}; move .* away to go on from the checkpoint before it"):
        latest(folder, run)


def test_a_checkpoint_of_another_config_is_refused(folder: Path, run: Run) -> None:
    other = run.model_copy(update={"seed": 2})
    make_generation(folder, other, Position(0, 3))
    with pytest.raises(CheckpointError, match="belongs to a run with another config"):
        latest(folder, run)


def test_another_model_parallel_layout_is_refused_where_the_distributed_optimizer_could_not_follow(
    folder: Path, run: Run
) -> None:
    def with_layout(**changes: object) -> Run:
        return run.model_copy(update={"parallel": run.parallel.model_copy(update=changes)})

    make_generation(folder, with_layout(distributed_optimizer=True), Position(0, 3))
    assert latest(folder, with_layout(distributed_optimizer=True, micro_batch=4)) is not None
    with pytest.raises(CheckpointError, match="tensor = 1, not 2; with the distributed optimizer only"):
        latest(folder, with_layout(distributed_optimizer=True, tensor=2))
    with pytest.raises(CheckpointError, match="distributed_optimizer = True, not False"):
        latest(folder, with_layout(distributed_optimizer=False))


def test_a_damaged_manifest_is_named(folder: Path, run: Run) -> None:
    place = make_generation(folder, run, Position(0, 3))
    (place / "manifest.json").write_text('{"phase": "prose", "st')
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        latest(folder, run)
