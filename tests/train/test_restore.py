"""Whatever is wrong with the newest generation: it is moved away with the reason, and the run ends as if nothing were.

Real runs. What a test damages is a copy of a run that was interrupted after its third step.
"""

import io
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import breaking
import pytest
import torch
from made_generations import changed
from rig import branch, forge, generation, run_ranks, short_run, state_saved, steps_saved, train, values
from torch.distributed.checkpoint.filesystem import _StorageInfo

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.distcp import read_metadata
from crystal_hpc.train.manifest import own_digest, read_manifest

FILES = (".metadata", "__0_0.distcp", "common.pt", "metadata.json", "manifest.json")
Damage = Callable[[Path], object]


class Bomb:
    """Unpickled by a careless reader, makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def flip(name: str, part: float) -> Damage:
    """Changes one bit of a file."""

    def damage(place: Path) -> None:
        def change(content: bytearray) -> None:
            content[int(len(content) * part)] ^= 4

        changed(place / name, change)

    return damage


def cut(name: str) -> Damage:
    return lambda place: os.truncate(place / name, (place / name).stat().st_size * 2 // 3)


def bomb_in_index(place: Path) -> None:
    (place / ".metadata").write_bytes(pickle.dumps(Bomb(place.parent / "ran")))
    forge(place)


def bomb_among_tensors(place: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(place.parent / "ran"), buffer)
    name, metadata = "__0_0.distcp", read_metadata(place)
    at = (place / name).stat().st_size
    with open(place / name, "ab") as file:
        file.write(buffer.getvalue())
    some = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
    metadata.storage_data[some] = _StorageInfo(name, at, len(buffer.getvalue()))
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(place)


def without_a_tensor(place: Path) -> None:
    metadata = read_metadata(place)
    del metadata.state_dict_metadata["optimizer.state.exp_avg.decoder.final_layernorm.weight"]
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(place)


def with_a_gap(place: Path) -> None:
    metadata = read_metadata(place)
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(place)


DAMAGES: dict[str, tuple[Damage, str]] = {
    **{f"no {name}": (lambda place, name=name: (place / name).unlink(), f"{name} is missing") for name in FILES[:4]},
    **{f"{name} cut": (cut(name), f"{name} has") for name in FILES[:4]},
    **{f"a bit of {name}": (flip(name, 0.5), f"{name} is damaged") for name in FILES[:4]},
    "the first bit of a tensor file": (flip("__0_0.distcp", 0.0), "__0_0.distcp is damaged"),
    "the last bit of a tensor file": (flip("__0_0.distcp", 0.99999), "__0_0.distcp is damaged"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "has no manifest.json"),
    "manifest cut": (cut("manifest.json"), "manifest.json: damaged"),
    "a bit of the manifest": (flip("manifest.json", 0.5), "manifest.json: damaged"),
    "an empty folder": (lambda place: [path.unlink() for path in place.iterdir()], "has no manifest.json"),
    "of another config": (lambda place: forge(place, digest="0" * 16), "belongs to a run with another config"),
    "of another step": (lambda place: forge(place, step=2), "lies in the place of another"),
    "an index that runs code": (bomb_in_index, "asks for posix.mkdir, which has no business there"),
    "a tensor that runs code": (bomb_among_tensors, "__0_0.distcp: cannot be read (Weights only load failed"),
    "a tensor less": (without_a_tensor, "has no tensor optimizer.state.exp_avg.decoder.final_layernorm.weight"),
    "a tensor with a gap": (with_a_gap, "of the 2688 numbers wanted of decoder.layers.mlp.linear_fc2.weight"),
}  # fmt: skip


def goes_on_from_the_one_before(folder: Path, said: str, size: int = 1, origin: Path | None = None) -> None:
    """Starts a run whose third generation is bad: what is moved, what is said, and how it ends."""
    found = values(run_ranks(train, size, folder, ["checkpoints.asynchronous=false"]))[0]
    assert (found.began, found.ended) == ((0, 2), (0, 4))
    (moved,) = (folder / "quarantine").iterdir()
    assert moved.name == "prose-step_00000003" and said in files.read_json(moved / "reason.json")["reason"]
    assert steps_saved(folder) == [f"prose/step_{step:08d}" for step in (1, 2, 3, 4)]
    for step in (3, 4):
        assert state_saved(generation(folder, step)) == state_saved(generation(origin, step))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_generation_is_moved_away_and_the_run_ends_bit_equal(
    new_run: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    origin = short_run(new_run)
    folder = branch(origin, tmp_path / "damaged", 3)
    damage, said = DAMAGES[kind]
    damage(generation(folder, 3))
    goes_on_from_the_one_before(folder, said, origin=origin)
    assert not (folder / "checkpoints" / "prose" / "ran").exists(), "code from a checkpoint was executed"


def test_the_code_in_those_files_would_run_for_a_careless_reader(new_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "bombs", 3)
    bomb_in_index(generation(folder, 3))
    pickle.loads((generation(folder, 3) / ".metadata").read_bytes())
    bomb_among_tensors(generation(folder, 2))
    mark = generation(folder, 3).parent / "ran"
    mark.rmdir()
    place = next(
        info
        for index, info in read_metadata(generation(folder, 2)).storage_data.items()
        if index.fqn == "decoder.final_layernorm.weight"
    )
    content = (generation(folder, 2) / place.relative_path).read_bytes()[place.offset :]
    torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists()


def test_a_generation_of_another_model_is_moved_away_though_its_manifest_claims_to_be_ours(
    new_run: Callable[..., Path], tmp_path: Path
) -> None:
    origin = short_run(new_run)
    other = short_run(new_run, 1, "model.ffn=96")
    folder = branch(origin, tmp_path / "foreign", 3)
    place = generation(folder, 3)
    shutil.rmtree(place)
    shutil.copytree(generation(other, 3), place)
    forge(place, digest=read_manifest(generation(origin, 3)).digest)
    goes_on_from_the_one_before(folder, "and this model's has (2, 168, 32)", origin=origin)


def test_a_generation_damaged_in_the_file_of_one_of_two_ranks_is_moved_away(
    new_run: Callable[..., Path], tmp_path: Path
) -> None:
    origin = short_run(new_run, 2)
    folder = branch(origin, tmp_path / "two", 3)
    flip("__1_0.distcp", 0.3)(generation(folder, 3))
    goes_on_from_the_one_before(folder, "__1_0.distcp is damaged", 2, origin)


def test_two_bad_generations_are_moved_and_the_third_is_used(new_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "two-bad", 3)
    flip("__0_0.distcp", 0.5)(generation(folder, 3))
    cut(".metadata")(generation(folder, 2))
    assert values(run_ranks(train, 1, folder))[0].began == (0, 1)
    assert len(list((folder / "quarantine").iterdir())) == 2


def test_a_generation_that_was_loaded_is_marked_as_verified(new_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "verified", 3)
    values(run_ranks(train, 1, folder))
    assert (generation(folder, 3) / "verified.json").exists()
    assert not (generation(folder, 2) / "verified.json").exists()


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_run_that_has_lost_all_its_generations_does_not_begin_again(
    new_run: Callable[..., Path], tmp_path: Path, attempts: int
) -> None:
    folder = branch(short_run(new_run), tmp_path / "lost", 3)
    for step in (1, 2, 3):
        flip("__0_0.distcp", 0.1 * step)(generation(folder, step))
    for _ in range(attempts):
        (ended,) = run_ranks(train, 1, folder)
        assert isinstance(ended.error, CheckpointError) and "none of its checkpoints can be used" in str(ended.error)
        assert "\n" not in str(ended.error) and "begin a run under another name" in str(ended.error)
    assert len(list((folder / "quarantine").iterdir())) == 3 and steps_saved(folder) == []


@pytest.mark.parametrize("one_is_damaged", [False, True])
def test_a_changed_config_is_an_error_and_nothing_is_moved(
    new_run: Callable[..., Path], tmp_path: Path, one_is_damaged: bool
) -> None:
    folder = branch(short_run(new_run), tmp_path / "changed", 3)
    if one_is_damaged:
        (generation(folder, 3) / "manifest.json").write_text("{")
    before = sorted(folder.rglob("*"))
    (ended,) = run_ranks(train, 1, folder, ["optimizer.beta1=0.8"])
    assert isinstance(ended.error, CheckpointError) and "use a run folder of its own" in str(ended.error)
    assert [path for path in sorted(folder.rglob("*")) if "meeting" not in path.name] == before + sorted(
        path for path in folder.rglob("*") if path.name.startswith(("tensorboard", "events", "metrics"))
    )


def test_checkpoints_of_another_version_are_not_moved_away(new_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "newer", 2)
    for step in (1, 2):
        path = generation(folder, step) / "manifest.json"
        files.write_json(path, files.read_json(path) | {"format": 99})
    (ended,) = run_ranks(train, 1, folder)
    assert isinstance(ended.error, CheckpointError) and "go on with the version of crystal_hpc" in str(ended.error)
    assert len(steps_saved(folder)) == 2 and not (folder / "quarantine").exists()


@pytest.mark.parametrize("lack", ["memory", "storage"])
def test_a_machine_that_cannot_read_costs_a_run_no_checkpoint(
    new_run: Callable[..., Path], tmp_path: Path, lack: str
) -> None:
    folder = branch(short_run(new_run), tmp_path / "sick", 3)
    how = (breaking.without_memory,) if lack == "memory" else (breaking.without_storage, generation(folder, 3))
    (ended,) = run_ranks(train, 1, folder, [], *how)
    assert isinstance(ended.error, CheckpointError) and "this says nothing of its content" in str(ended.error)
    assert len(steps_saved(folder)) == 3 and not (folder / "quarantine").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_damage_that_one_rank_alone_sees_is_blamed_on_its_node(
    new_run: Callable[..., Path], tmp_path: Path, victim: int
) -> None:
    folder = branch(short_run(new_run, 2), tmp_path / "sick", 3)
    for ended in run_ranks(train, 2, folder, [], breaking.only_one_rank_sees_damage, victim):
        assert isinstance(ended.error, CheckpointError), ended
        assert f"rank {victim} reads other bytes of" in str(ended.error) and "distrust its node" in str(ended.error)
    assert len(steps_saved(folder)) == 3 and not (folder / "quarantine").exists()


def test_no_byte_of_a_manifest_changes_unnoticed(new_run: Callable[..., Path], tmp_path: Path) -> None:
    origin = generation(short_run(new_run), 3) / "manifest.json"
    whole, said = origin.read_bytes(), files.read_json(origin)
    assert said["xxh3"] == own_digest(said)
    for at in range(0, len(whole), 23):
        content = bytearray(whole)
        content[at] ^= 1
        (tmp_path / "manifest.json").write_bytes(content)
        try:
            if files.read_json(tmp_path / "manifest.json") == said:  # white space for white space
                continue
        except ValueError:
            pass
        with pytest.raises(CheckpointError, match=r"manifest\.json: (damaged|is of format)"):
            read_manifest(tmp_path)


def test_a_full_disk_does_not_keep_a_run_from_starting(
    new_run: Callable[..., Path], tmp_path: Path, small_disk: Path
) -> None:
    origin = short_run(new_run)
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    folder = branch(origin, small_disk / "full", 3)
    breaking.fill(small_disk)
    (ended,) = run_ranks(_load, 1, folder)
    assert ended.value == (0, 3) and not (generation(folder, 3) / "verified.json").exists()


def _load(rank: int, size: int, meeting: str, folder: Path) -> tuple[int, int]:
    from rig import join

    from crystal_hpc.train import restore

    position, _ = restore.load_latest(join(rank, size, meeting, folder), folder)
    return position.phase, position.step
