"""Which folders count as generations, how damage is found and named, and where it is put. Real files throughout."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dying import killed_at
from made_generations import changed, make_generation

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import CheckpointError, DiskError
from crystal_hpc.train.generations import (
    damaged,
    find_damage,
    generation_folder,
    generations,
    keep,
    latest,
    mark_verified,
    quarantine,
    quarantined,
    remove_pending,
    share_of,
    unkeep,
    unlisted,
)
from crystal_hpc.train.manifest import OWN_DIGEST, FileEntry, Manifest, own_digest, read_manifest
from crystal_hpc.train.state import Position


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(tiny_config: dict[str, Any], write_config: Callable[..., Path]) -> Run:
    return load_run(write_config(tiny_config))


def test_a_run_without_checkpoints_has_none(folder: Path, run: Run) -> None:
    assert generations(folder, run) == [] and damaged(folder, run) == [] and latest(folder, run) is None
    assert quarantined(folder) == []
    remove_pending(folder)


def test_generations_come_in_order_of_phase_and_step(folder: Path, run: Run) -> None:
    for position in (Position(0, 5), Position(1, 2), Position(0, 3)):
        make_generation(folder, run, position)
    found = generations(folder, run)
    assert [one.position for one in found] == [Position(0, 3), Position(0, 5), Position(1, 2)]
    newest = latest(folder, run)
    assert newest == found[-1] and newest.label == "code/2"
    assert newest.folder == generation_folder(folder, run, Position(1, 2)) and newest.manifest.tokens == 7 * 128


def test_what_was_cut_short_never_counts_and_is_deleted_on_demand(folder: Path, run: Run) -> None:
    make_generation(folder, run, Position(0, 3))
    for ending in (".pending", ".pruned"):
        place = make_generation(folder, run, Position(0, 5))
        place.rename(place.with_name(place.name + ending))
    assert [one.position.step for one in generations(folder, run)] == [3] and damaged(folder, run) == []
    remove_pending(folder)
    assert [path.name for path in (folder / "checkpoints" / "prose").iterdir()] == ["step_00000003"]


def test_marks_are_read_and_taken_away(folder: Path, run: Run) -> None:
    place = make_generation(folder, run, Position(0, 3))
    (one,) = generations(folder, run)
    assert one.verified is None and one.kept is None
    mark_verified(place, "crystal checkpoints")
    keep(place, "before the change")
    (one,) = generations(folder, run)
    assert one.verified and one.verified["by"] == "crystal checkpoints" and one.verified["time"] > 1e9
    assert one.kept and one.kept["name"] == "before the change"
    assert find_damage(place, one.manifest) == []
    unkeep(place)
    unkeep(place)
    assert generations(folder, run)[0].kept is None


def test_a_damaged_mark_verifies_nothing_and_still_keeps(folder: Path, run: Run) -> None:
    place = make_generation(folder, run, Position(0, 3), verified=True)
    for name in ("verified.json", "kept.json"):
        (place / name).write_text('{"na')
    (one,) = generations(folder, run)
    assert one.verified is None and one.kept is not None


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "x" * 65, "\x1b[31m"])
def test_a_name_that_cannot_be_shown_is_refused(folder: Path, run: Run, name: str) -> None:
    place = make_generation(folder, run, Position(0, 3))
    with pytest.raises(CheckpointError, match="1 to 64 characters"):
        keep(place, name)
    assert not (place / "kept.json").exists()


def edit_manifest(place: Path, **changes: object) -> None:
    content = json.loads((place / "manifest.json").read_text())
    content |= changes
    (place / "manifest.json").write_text(json.dumps(content | {OWN_DIGEST: own_digest(content)}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / "manifest.json").unlink(), "has no manifest.json"),
        (lambda place: (place / "manifest.json").write_text('{"format": 2, "ki'), "manifest.json: damaged"),
        (lambda place: (place / "manifest.json").write_bytes(b""), "manifest.json: damaged"),
        (lambda place: (place / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json: damaged"),
        (lambda place: (place / "manifest.json").write_text("[" * 100_000), "manifest.json: damaged"),
        (lambda place: edit_manifest(place, format=1), "is of format 1"),
        (lambda place: edit_manifest(place, files=3), "damaged (files"),
        (lambda place: edit_manifest(place, step=4), "lies in the place of another"),
        (lambda place: edit_manifest(place, phase="code"), "its manifest says phase code, step 3"),
        (lambda place: edit_manifest(place, digest="0" * 16), "belongs to a run with another config"),
        (lambda place: edit_manifest(place, kind="weights"), "holds weights alone"),
    ],
)
def test_a_folder_that_is_no_generation_of_the_run_is_named_with_the_reason(
    folder: Path, run: Run, damage: Callable[[Path], object], said: str
) -> None:
    make_generation(folder, run, Position(0, 2))
    place = make_generation(folder, run, Position(0, 3))
    damage(place)
    ((bad, reason),) = damaged(folder, run)
    assert bad == place and said in reason and "\n" not in reason and str(place) not in reason
    assert [one.position.step for one in generations(folder, run)] == [2]


def test_a_phase_or_step_that_the_run_does_not_have_is_named(folder: Path, run: Run) -> None:
    other = make_generation(
        folder, run, Position(0, 3), phase="other", folder=folder / "checkpoints/other/step_00000003"
    )
    beyond = make_generation(folder, run, Position(0, 3), step=6, folder=folder / "checkpoints/prose/step_00000006")
    reasons = dict(damaged(folder, run))
    assert "phase other, which the run does not have" in reasons[other]
    assert "step 6, and phase prose has 5 steps" in reasons[beyond]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 60), "has 60 bytes, not "),
        (lambda path: path.write_bytes(b""), "has 0 bytes, not "),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), " bytes, not "),
        (lambda path: changed(path, lambda content: content.__setitem__(99, content[99] ^ 1)), "its digest is "),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder, not a file"),
    ],
)
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "common.pt"])
def test_each_kind_of_damage_to_any_file_is_found_and_named(
    folder: Path, run: Run, name: str, damage: Callable[[Path], object], said: str
) -> None:
    place = make_generation(folder, run, Position(0, 3))
    manifest = read_manifest(place)
    assert find_damage(place, manifest) == []
    damage(place / name)
    (finding,) = find_damage(place, manifest)
    assert finding.startswith(f"{name} ") and said in finding


def test_several_kinds_of_damage_are_told_at_once(folder: Path, run: Run) -> None:
    place = make_generation(folder, run, Position(0, 3))
    manifest = read_manifest(place)
    (place / ".metadata").unlink()
    os.truncate(place / "__0_0.distcp", 1)
    (place / "stranger.pt").write_bytes(b"x")
    assert find_damage(place, manifest) == [
        "stranger.pt is not in the manifest",
        ".metadata is missing",
        f"__0_0.distcp has 1 bytes, not {manifest.files['__0_0.distcp'].bytes}",
    ]
    assert find_damage(place, manifest, ["__1_0.distcp"]) == []
    assert unlisted(place, manifest) == ["stranger.pt is not in the manifest"]


def test_half_written_marks_and_what_nfs_leaves_are_no_damage(folder: Path, run: Run) -> None:
    place = make_generation(folder, run, Position(0, 3), verified=True)
    for name in ("verified.json.17.pending", "kept.json.4.pending", ".nfs000000000123"):
        (place / name).write_text("{")
    assert find_damage(place, read_manifest(place)) == []


def test_a_disk_that_cannot_be_read_is_no_reason_to_give_a_generation_up(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_generation(folder, run, Position(0, 3))
    manifest = read_manifest(place)
    # A process's memory at address 0: a real file, the reading of which is a real EIO.
    (place / "__0_0.distcp").unlink()
    (place / "__0_0.distcp").symlink_to("/proc/self/mem")
    entries = manifest.files | {"__0_0.distcp": FileEntry(0, "0")}
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: cannot be read now \(Input/output error\)"):
        find_damage(place, Manifest(**manifest.__dict__ | {"files": entries}))
    (place / "manifest.json").unlink()
    (place / "manifest.json").symlink_to("/proc/self/mem")
    for look in (damaged, generations):
        with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read now \(Input/output error\)"):
            look(folder, run)


def test_progress_is_told_in_bytes_and_may_end_the_reading(folder: Path, run: Run) -> None:
    place = make_generation(folder, run, Position(0, 3))
    manifest = read_manifest(place)
    told: list[tuple[str, int, int]] = []
    find_damage(place, manifest, on_progress=lambda *said: told.append(said))
    assert told[-1] == ("verifying", manifest.bytes, manifest.bytes)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)

    def stop(*_: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        find_damage(place, manifest, on_progress=stop)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_the_files_out_evenly_and_each_is_read_once(folder: Path, run: Run, size: int) -> None:
    manifest = read_manifest(make_generation(folder, run, Position(0, 3)))
    entries = {f"__{n}_0.distcp": FileEntry(1000 + 100 * n, "") for n in range(12)} | {"common.pt": FileEntry(5, "")}
    manifest = Manifest(**manifest.__dict__ | {"files": entries})
    shares = [share_of(manifest, rank, size) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(entries)
    loads = [sum(entries[name].bytes for name in share) for share in shares]
    assert max(loads) - min(loads) <= 2100


def test_quarantine_moves_a_generation_with_its_reason_and_overwrites_nothing(folder: Path, run: Run) -> None:
    for number in range(3):
        place = make_generation(folder, run, Position(0, 3))
        to = quarantine(folder, place, f"reason {number}")
        assert not place.exists() and (to / "__0_0.distcp").exists()
    room = folder / "quarantine"
    names = ["prose-step_00000003", "prose-step_00000003.2", "prose-step_00000003.3"]
    assert sorted(path.name for path in room.iterdir()) == names
    assert quarantined(folder) == [(room / name, f"reason {number}") for number, name in enumerate(names)]
    assert generations(folder, run) == [] and damaged(folder, run) == []


def test_a_linked_generation_in_quarantine_still_leads_to_its_data(folder: Path, run: Run, tmp_path: Path) -> None:
    place = make_generation(folder, run, Position(0, 3))
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(os.path.relpath(tmp_path / "elsewhere", place.parent))
    to = quarantine(folder, place, "bad")
    assert not place.is_symlink() and (to / "__0_0.distcp").exists()
    assert quarantined(folder) == [(to, "bad")]


def test_quarantine_of_what_is_not_there_or_on_a_full_disk_says_so(folder: Path, run: Run, small_disk: Path) -> None:
    place = make_generation(folder, run, Position(0, 3))
    with pytest.raises(CheckpointError, match="no such folder"):
        quarantine(folder, place.with_name("step_00000004"), "bad")
    (folder / "quarantine").rmdir()
    (folder / "quarantine").symlink_to(small_disk)
    with pytest.raises(CheckpointError, match="bad; .* is on another file system: move it away yourself"):
        quarantine(folder, place, "bad")
    (small_disk / "run").mkdir()
    full = make_generation(small_disk / "run", run, Position(0, 3))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(DiskError, match="disk is full"):
        quarantine(small_disk / "run", full, "bad")
    assert [one.folder for one in generations(small_disk / "run", run)] == [full]


def test_a_damaged_reason_does_not_hide_the_rest(folder: Path, run: Run) -> None:
    to = quarantine(folder, make_generation(folder, run, Position(0, 3)), "bad")
    (to / "reason.json").write_text('{"reason": ["')
    other = quarantine(folder, make_generation(folder, run, Position(0, 4)), "worse")
    assert quarantined(folder) == [(to, "reason unknown"), (other, "worse")]


def test_a_quarantine_killed_at_any_step_is_finished_by_the_next(folder: Path, run: Run) -> None:
    place, moment = make_generation(folder, run, Position(0, 3)), 1
    while killed_at(moment, lambda: quarantine(folder, place, "bad")):
        if place.exists():
            assert latest(folder, run) is not None  # whole, with its files: nothing is half moved
            quarantine(folder, place, "bad")
        assert [reason for _, reason in quarantined(folder)] == ["bad"]
        (to,) = (folder / "quarantine").iterdir()
        findings = find_damage(to, read_manifest(to))
        assert findings and all(finding.startswith("reason.json") for finding in findings)
        files.remove_folder(folder)
        make_generation(folder, run, Position(0, 3))
        moment += 1
    assert moment > 6
