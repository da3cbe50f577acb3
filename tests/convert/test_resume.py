"""Conversions that are killed go on where they were, and keep nothing that is not proven to be of the same kind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dying import killed_at
from trained_runs import REPOSITORY, Trained

from crystal_hpc import files
from crystal_hpc.convert import from_hf, weights
from crystal_hpc.convert.export import Options, export_checkpoint
from crystal_hpc.convert.resume import PROGRESS, settle, working
from crystal_hpc.errors import CheckpointError, DiskError, RunError

SHARD = 20_000
Killed = Callable[[str, int, Path], Path]

# Kills itself (-9) when that many files are finished, in the middle of the next one.
KILLED = """
import os, signal, sys
from pathlib import Path
from crystal_hpc.convert import from_hf, weights
from crystal_hpc.convert.reader import run_of
from crystal_hpc.convert.resume import Work
from crystal_hpc.convert.weights import Meter

what, source, run, out, after = sys.argv[1:]
notes, note, add = 0, Work.note, Meter.add

def counted(self, *args, **more):
    global notes
    notes += 1
    return note(self, *args, **more)

def deadly(self, nbytes):
    add(self, nbytes)
    if notes == int(after):
        os.kill(os.getpid(), signal.SIGKILL)

Work.note, Meter.add = counted, deadly
if what == "export":
    weights.export(Path(source), run_of(Path(source), Path(run)), None, Path(out), shard_bytes=20_000)
else:
    with from_hf.opened(Path(source)) as opened:
        from_hf.convert(opened, Path(out), shard_bytes=20_000)
"""


def convert(what: str, source: Path, trained: Trained, out: Path, **options: Any) -> None:
    if what == "export":
        weights.export(source, trained.run(), None, out, **{"shard_bytes": SHARD, **options})
    else:
        with from_hf.opened(source) as opened:
            from_hf.convert(opened, out, **{"shard_bytes": SHARD, **options})


def content(folder: Path) -> dict[str, bytes]:
    """All files, without what says when they were made."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    if "manifest.json" in found:
        manifest = json.loads(found["manifest.json"])
        manifest |= {"created": 0, "seconds": 0, "xxh3": ""}
        found["manifest.json"] = json.dumps(manifest).encode()
    return found


@pytest.fixture(scope="module")
def sources(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What to export, and what to import."""
    out = tmp_path_factory.mktemp("sources") / "hf"
    weights.export(trained.checkpoint("plain"), trained.run(), None, out)
    return {"export": trained.checkpoint("plain"), "import": out}


@pytest.fixture(scope="module")
def killed(trained: Trained, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Puts beside `out` what a conversion leaves that is killed after so many files; each is killed only once."""
    folder = tmp_path_factory.mktemp("killed")

    def bring(what: str, after: int, out: Path) -> Path:
        made = folder / f"{what}-{after}"
        if not made.with_name(f"{made.name}.pending").exists():
            run = trained.folder / "run.yaml"
            words = [sys.executable, "-c", KILLED, what, str(sources[what]), str(run), str(made), str(after)]
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert not made.exists()
        pending = out.with_name(f"{out.name}.pending")
        shutil.copytree(made.with_name(f"{made.name}.pending"), pending)
        return pending

    return bring


def finished(pending: Path) -> dict[str, int]:
    """Time of change of each file with weights that was noted."""
    notes = list(files.read_lines(pending / PROGRESS))[1:]
    return {note["file"]: (pending / note["file"]).stat().st_mtime_ns for note in notes}


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("what", ["export", "import"])
def test_a_killed_conversion_goes_on_and_comes_out_as_if_nothing_had_been(
    what: str, after: int, trained: Trained, sources: dict[str, Path], killed: Killed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pending = killed(what, after, out)
    kept = finished(pending)
    assert len(kept) == after
    time.sleep(0.01)
    convert(what, sources[what], trained, out)
    convert(what, sources[what], trained, tmp_path / "straight")
    assert content(out) == content(tmp_path / "straight")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "finished files were not written again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


@pytest.mark.parametrize("how", ["damaged", "cut short", "gone"])
@pytest.mark.parametrize("what", ["export", "import"])
def test_a_finished_file_that_is_no_longer_what_it_was_is_written_again(
    what: str, how: str, trained: Trained, sources: dict[str, Path], killed: Killed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pending = killed(what, 2, out)
    victim = pending / min(finished(pending))
    spoiled = bytearray(victim.read_bytes())
    spoiled[-9] ^= 1
    match how:
        case "damaged":
            victim.write_bytes(spoiled)
        case "cut short":
            victim.write_bytes(spoiled[:-1])
        case "gone":
            victim.unlink()
    convert(what, sources[what], trained, out)
    convert(what, sources[what], trained, tmp_path / "straight")
    assert content(out) == content(tmp_path / "straight")


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"shard_bytes": 2 * SHARD}])
@pytest.mark.parametrize("what", ["export", "import"])
def test_another_conversion_begins_anew(
    what: str,
    options: dict[str, Any],
    trained: Trained,
    sources: dict[str, Path],
    killed: Killed,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    (killed(what, 2, out) / "rubbish").mkdir()
    convert(what, sources[what], trained, out, **options)
    convert(what, sources[what], trained, tmp_path / "straight", **options)
    assert content(out) == content(tmp_path / "straight")


def test_files_of_another_checkpoint_are_not_taken_over(trained: Trained, killed: Killed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed("export", 2, out)
    convert("export", trained.checkpoint("tensor"), trained, out)
    marker = json.loads((out / "export.json").read_text())
    assert marker["manifest"] == files.digest_file(trained.checkpoint("tensor") / "manifest.json")


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"out\.pending: another process is writing it"),
        working(tmp_path / "out", {"a": 1}, "export.json", False),
        working(tmp_path / "out", {"a": 1}, "export.json", False),
    ):
        raise AssertionError("both are inside")


def test_what_is_finished_outlives_a_full_disk_but_not_a_source_that_cannot_be_converted(tmp_path: Path) -> None:
    out, pending = tmp_path / "out", tmp_path / "out.pending"

    def attempt(error: Exception) -> list[str]:
        with pytest.raises(type(error)), working(out, {"a": 1}, "export.json", False) as work:
            before = list(work.finished)
            (work.folder / "one").write_text("1")
            work.note("one", 1, files.digest_file(work.folder / "one"))
            raise error
        return before

    assert attempt(DiskError("full")) == [] and pending.exists()
    assert attempt(KeyboardInterrupt("stop")) == ["one"] and pending.exists()
    assert attempt(CheckpointError("damaged")) == ["one"] and not pending.exists()
    assert attempt(DiskError("full")) == []


def test_notes_of_nonsense_are_no_notes(tmp_path: Path) -> None:
    pending = tmp_path / "out.pending"
    pending.mkdir()
    for lines in ("", "{", "[]\n", '{"identity": {"a": 1}}\n{"file": "../x"}\n{"file": 3}\n{}\n'):
        (pending / PROGRESS).write_text(lines)
        with working(tmp_path / "out", {"a": 1}, "export.json", True) as work:
            assert work.finished == {}
            (work.folder / "export.json").write_text("{}")
        assert (tmp_path / "out" / "export.json").exists()
        pending.mkdir()


def put(out: Path, text: str, overwrite: bool = True) -> None:
    """A conversion of two files and a marker, all of them saying `text`."""
    with working(out, {"text": text}, "export.json", overwrite) as work:
        for name in ("one", "two"):
            if name not in work.finished:
                (work.folder / name).write_text(text)
                work.note(name, len(text), files.digest_file(work.folder / name))
        files.write_file(work.folder / "export.json", text)


def seen(out: Path) -> str:
    """What a whole conversion says, and `nothing` where there is none; fails for half of one."""
    if not out.exists():
        return "nothing"
    (text,) = {(out / name).read_text() for name in ("one", "two", "export.json")}
    assert len(list(out.iterdir())) == 3
    return text


@pytest.mark.parametrize("before", ["nothing", "old"])
@pytest.mark.parametrize("then", ["starts", "overwrites", "asks whether it is done"])
def test_a_replacement_killed_at_any_step_is_ended_by_the_next_start(before: str, then: str, tmp_path: Path) -> None:
    out, left, moment = tmp_path / "out", [], 1
    if before == "old":
        put(out, "old")
    while killed_at(moment, lambda: put(out, "new")):
        left.append(seen(out))
        if then == "overwrites":
            put(out, "new")
        elif then == "asks whether it is done":
            settle(out, "export.json")
        else:
            with contextlib.suppress(CheckpointError):  # holds an export already
                put(out, "new", overwrite=False)
        after = seen(out)
        if before == "old" and left[-1] != "old":
            assert after == "new"
        elif then != "asks whether it is done":
            assert after == ("old" if (before, then) == ("old", "starts") else "new")
        else:
            assert after in (before, "new")
        beside = {path.name for path in tmp_path.iterdir()} - {"out"}
        assert not beside if after == "new" else beside <= {"out.pending"}
        files.remove_folder(out)  # and all as it was before
        files.remove_folder(tmp_path / "out.pending")
        if before == "old":
            put(out, "old")
        moment += 1
    assert seen(out) == "new" and set(left) == {before, "nothing", "new"}


def test_an_older_folder_is_put_back_where_the_newer_one_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out, "old")
    out.rename(tmp_path / "out.old.pending")
    settle(out, "export.json")
    assert seen(out) == "old"
    (tmp_path / "out.old.pending").mkdir()  # what a kill in the middle of its deletion leaves
    files.remove_folder(out)
    settle(out, "export.json")
    assert list(tmp_path.iterdir()) == []


def test_an_export_killed_between_the_two_renames_was_exported_already(
    trained: Trained, tokenizer_folder: Path, tmp_path: Path
) -> None:
    checkpoint, run, out = trained.checkpoint("plain"), trained.run(), tmp_path / "out"
    export_checkpoint(checkpoint, run, tokenizer_folder, out, Options(verify="none", dtype="bfloat16"))

    def replace() -> None:
        rename = os.rename

        def deadly(source: Any, target: Any, **more: Any) -> None:
            if str(target) == str(out):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target, **more)

        os.rename = deadly  # type: ignore[assignment]
        export_checkpoint(checkpoint, run, tokenizer_folder, out, Options(verify="none", overwrite=True))

    assert killed_at(0, replace) and not out.exists()
    said = export_checkpoint(checkpoint, run, tokenizer_folder, out, Options(verify="none", skip_done=True))
    assert said == f"{out}: was exported already"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
