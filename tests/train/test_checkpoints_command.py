"""`crystal checkpoints`: what it lists, verifies, names and deletes, and that it moves nothing."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from made_generations import changed, make_generation

from crystal_hpc import files
from crystal_hpc.cli import main
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.train.generations import generation_folder, generations, keep, quarantine
from crystal_hpc.train.state import Position

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, tiny_config: dict[str, Any], write_config: Callable[..., Path]) -> Path:
    """A run with a folder, and checkpoints 1 to 4 of its first phase, one every step, the last two to be kept."""
    place = tmp_path / "run"
    place.mkdir()
    write_config(tiny_config | {"checkpoints": {"keep_last": 2}}, "run/run.yaml")
    run = load_run(place / "run.yaml")
    for step in range(1, 5):
        make_generation(place, run, Position(0, step), "time limit" if step == 2 else "periodic")
    return place


@pytest.fixture
def run(folder: Path) -> Run:
    return load_run(folder / "run.yaml")


@pytest.fixture
def crystal(folder: Path) -> Callable[..., Result]:
    """`crystal checkpoints RUN ...` in this process."""
    return lambda *words: CliRunner().invoke(main, ["checkpoints", str(folder), *(str(word) for word in words)])


def lines_of(result: Result) -> list[list[str]]:
    """The lines of stdout, cut where two blanks or more are."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()]


def test_the_table_says_what_was_saved_and_why_it_is_kept(crystal: Callable[..., Result], folder: Path) -> None:
    result = crystal()
    assert result.exit_code == 0 and "\x1b" not in result.stdout
    head, *rows, total = lines_of(result)
    assert head == ["phase", "step", "tokens", "size", "age", "saved", "verified", "kept"]
    assert [[row[at] for at in (0, 1, 2, 5, 6, 7)] for row in rows] == [
        ["prose", "1", "128", "periodic", "no", "may go"],
        ["prose", "2", "256", "time limit", "no", "may go"],
        ["prose", "3", "384", "periodic", "no", "last 2"],
        ["prose", "4", "512", "periodic", "no", "last 2, newest"],
    ]
    assert all(row[3].endswith(" kB") and row[4].endswith("s") for row in rows)
    assert total[0].startswith("4 checkpoints, ") and total[0].endswith(" kB")


def test_a_terminal_gets_a_drawn_table_and_names_are_no_markup(folder: Path, run: Run) -> None:
    keep(generation_folder(folder, run, Position(0, 1)), "[red]x")
    controller, terminal = pty.openpty()
    words = [sys.executable, "-m", "crystal_hpc.cli", "checkpoints", str(folder)]
    variables = {**os.environ, "COLUMNS": "140", "TERM": "xterm"}
    done = subprocess.run(words, stdout=terminal, env=variables, cwd=REPOSITORY, timeout=60)
    os.close(terminal)
    said = os.read(controller, 1 << 16).decode()
    assert done.returncode == 0 and "┃" in said and "named [red]x" in said


def test_a_run_without_checkpoints_says_so(crystal: Callable[..., Result], folder: Path) -> None:
    files.remove_folder(folder / "checkpoints")
    result = crystal()
    assert (result.exit_code, result.stdout) == (0, "0 checkpoints, 0 bytes\n")


def test_what_does_not_count_stands_below_the_table(crystal: Callable[..., Result], folder: Path, run: Run) -> None:
    quarantine(folder, generation_folder(folder, run, Position(0, 1)), "__0_0.distcp is missing")
    for step, ending in ((2, ".pending"), (3, ".pruned")):
        place = generation_folder(folder, run, Position(0, step))
        place.rename(place.with_name(place.name + ending))
    (generation_folder(folder, run, Position(0, 4)) / "manifest.json").write_text("{")
    said = crystal().stdout.splitlines()
    assert said[0] == "0 checkpoints, 0 bytes"
    assert said[1].startswith("damaged: ") and "step_00000004: manifest.json: damaged (" in said[1]
    assert said[1].endswith("the next start of the run moves it to quarantine")
    assert said[2].endswith("quarantine/prose-step_00000001: __0_0.distcp is missing")
    assert [line.split(":")[0] for line in said[3:]] == ["pending", "pending"]


def test_verify_reads_everything_and_marks_it(crystal: Callable[..., Result], folder: Path, run: Run) -> None:
    result = crystal("--verify")
    assert result.exit_code == 0, result.output
    assert all(row[6].endswith(" ago") for row in lines_of(result)[1:-1])
    marks = [one.verified for one in generations(folder, run)]
    assert all(mark and mark["by"].startswith("crystal checkpoints on ") for mark in marks)
    assert "last 2, newest, the newest verified one" in result.stdout


def test_verify_names_damage_and_moves_nothing(crystal: Callable[..., Result], folder: Path, run: Run) -> None:
    assert crystal("--verify").exit_code == 0
    places = [generation_folder(folder, run, Position(0, step)) for step in range(1, 5)]
    (places[0] / ".metadata").unlink()
    changed(places[2] / "__1_0.distcp", lambda content: content.__setitem__(500, content[500] ^ 4))
    (places[3] / "manifest.json").unlink()
    result = crystal("--verify")
    assert result.exit_code == 1
    one, three, four = (line for line in sorted(result.stderr.splitlines()) if line.startswith("bad: "))
    assert one == "bad: prose/1: .metadata is missing"
    assert three.startswith("bad: prose/3: __1_0.distcp is damaged: its digest is ")
    assert four.startswith("bad: prose/step_00000004: has no manifest.json")
    assert "nothing was moved, because a running job may hold it" in result.stderr
    assert all(place.exists() for place in places) and not (folder / "quarantine").exists()
    # A mark that was proved wrong is no more believed.
    assert [bool(one.verified) for one in generations(folder, run)] == [False, True, False]
    assert crystal().exit_code == 0  # listing alone judges nothing


def test_a_file_that_cannot_be_read_now_does_not_hide_the_others(
    crystal: Callable[..., Result], folder: Path, run: Run
) -> None:
    path = generation_folder(folder, run, Position(0, 1)) / "common.pt"
    path.unlink()
    path.symlink_to(path.name)  # round in a circle: ELOOP
    result = crystal("--verify")
    assert result.exit_code == 1 and "common.pt: cannot be read now (Too many levels" in result.stderr
    assert [bool(one.verified) for one in generations(folder, run)] == [False, True, True, True]


def test_prune_deletes_what_the_table_says_may_go(crystal: Callable[..., Result], folder: Path, run: Run) -> None:
    planned = crystal("--prune", "--dry-run")
    assert planned.exit_code == 0 and planned.stdout.count("would delete prose/") == 2
    assert planned.stdout.count("may go") == 2 and len(generations(folder, run)) == 4
    result = crystal("--prune")
    assert result.exit_code == 0 and result.stdout.count("deleted prose/") == 2 and "may go" not in result.stdout
    assert [one.position.step for one in generations(folder, run)] == [3, 4]


def test_a_named_checkpoint_survives_until_its_name_is_dropped(
    crystal: Callable[..., Result], folder: Path, run: Run
) -> None:
    result = crystal("--keep", "prose/1", "--name", "before-lr-change", "--prune")
    assert result.exit_code == 0 and "named before-lr-change" in result.stdout
    assert [one.position.step for one in generations(folder, run)] == [1, 3, 4]
    assert "may go" in crystal("--drop-name", "prose/step_00000001").stdout
    assert crystal("--prune").exit_code == 0
    assert [one.position.step for one in generations(folder, run)] == [3, 4]


def test_json_has_it_all(crystal: Callable[..., Result], folder: Path, run: Run) -> None:
    (generation_folder(folder, run, Position(0, 4)) / "common.pt").unlink()
    result = crystal("--json", "--verify", "--prune")
    said = json.loads(result.stdout)
    assert result.exit_code == 1 and said["bad"] == {"prose/4": ["common.pt is missing"]}
    assert said["deleted"] == ["prose/1", "prose/2"]
    assert said["bytes"] == sum(one["bytes"] for one in said["generations"])
    three, four = said["generations"]
    assert three["verified"] > 1e9 and four["verified"] is None and four["kept"] == ["last 2", "newest"]
    assert three["phase"] == "prose" and three["step"] == 3 and three["folder"].endswith("step_00000003")
    assert json.loads(crystal("--json").stdout)["bad"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep", "prose/1"], "--keep and --name belong together"),
        (["--name", "x"], "--keep and --name belong together"),
        (["--dry-run"], "--dry-run says what --prune would delete"),
        (["--keep", "prose/9", "--name", "x"], "no checkpoint prose/9; PHASE/STEP is one of: prose/1, prose/2"),
        (["--keep", "prose", "--name", "x"], "no checkpoint prose; PHASE/STEP"),
        (["--drop-name", "code/1"], "no checkpoint code/1"),
        (["--keep", "prose/1", "--name", "a\nb"], "1 to 64 characters on one line"),
    ],
)
def test_a_mistake_is_one_line(crystal: Callable[..., Result], words: list[str], said: str) -> None:
    result = crystal(*words)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["checkpoints", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "not a run folder" in result.stderr


def test_it_needs_no_torch(folder: Path) -> None:
    program = f"""
import sys
from crystal_hpc.cli import main
main(["checkpoints", {str(folder)!r}, "--verify", "--prune"], standalone_mode=False)
"""
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", check + program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr
