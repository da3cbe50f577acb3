"""`tools/mup_sweep.py` from end to end on real models: what it finds, that it goes on where it was, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from crystal_hpc.mup_check import figures

ROOT = Path(__file__).parents[2]
COORDINATES = ("--widths", "64,128", "--coordinate-widths", "64,128,256,512", "--coordinate-rate", "0.003")
COORDINATES += ("--coordinate-steps", "4")
TRANSFER = ("--rates", "0.01,0.02", "--steps", "3")


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/mup_sweep.py"), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("points/*.json"))]


def test_activations_are_flat_with_mup_and_grow_without_and_a_half_finished_sweep_goes_on(
    narrow_file: Path, one_rank: Path, tmp_path: Path, tiny_data: Path
) -> None:
    folder, code_store = tmp_path / "sweep", str(tiny_data / "code")
    # What the sweep does not read need not be there.
    elsewhere = ("data.sources.code=elsewhere", "data.held_out.held-out=nowhere")
    first = call(narrow_file, "--cluster", one_rank, "--out", folder, *COORDINATES, "--rates", "", *elsewhere)
    assert first.returncode == 0, first.stdout + first.stderr
    found = results(folder)
    assert len(found) == 8
    # Over a range of widths of a factor of 8, a slope of 0.15 is a factor of 1.4, one of 0.8 a factor of 5.
    low, high = figures.extremes(found, mup=True)
    assert -0.15 < low <= high < 0.15
    grown = {part: by_step[-1] for part, by_step in figures.slopes(found, mup=False).items()}
    assert all((grown[f"layer 1 {part}"] or 0) > 0.8 for part in ("attention", "MLP")), grown
    started = figures.slopes(found, mup=False, kind="sizes")
    assert all(abs(started[f"layer 1 {part}"][0] or 0) < 0.1 for part in ("attention", "MLP")), started
    assert "muP: flat" in first.stdout
    assert "standard: not flat" in first.stdout
    assert (folder / "coordinates.svg").exists()
    assert not (folder / "transfer.svg").exists()

    lost, *kept = sorted(folder.glob("points/*.json"))
    before, written = json.loads(lost.read_text()), {path: path.stat().st_mtime_ns for path in kept}
    lost.rename(lost.with_name(lost.name + ".1.pending"))  # as if the worker had been killed while writing
    second = call(narrow_file, "--cluster", one_rank, "--out", folder, *COORDINATES, *TRANSFER)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "7 of 16 points are done" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == written
    assert json.loads(lost.read_text()) == before, "the same point came to something else"
    assert len(figures.best_rates(results(folder), mup=True)) == 2
    assert (folder / "transfer.svg").exists()
    assert str(folder / "report.html") in second.stdout

    third = call(narrow_file, "--cluster", one_rank, "--out", folder, *COORDINATES, *TRANSFER)
    assert third.stdout == second.stdout.partition("\n")[2], "it was all there, and needed no job"
    other = call(narrow_file, "--cluster", one_rank, "--out", folder, *COORDINATES, *TRANSFER, "--steps", 5)
    assert other.returncode == 2
    assert "was trained with another config or number of steps" in other.stderr
    moved = call(narrow_file, "--cluster", one_rank, "--out", folder, *COORDINATES, "data.sources.prose=" + code_store)
    assert moved.returncode == 2
    assert "was begun with other token stores" in moved.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths", "64,100"], "width 100: not a multiple of the heads' width, 16"),
        (["--widths", "64,wide"], "--widths: '64,wide': write numbers with commas between them"),
        (["--widths", "64,128", "--rates", "0.01,0"], "learning rate 0: must be above 0"),
        (["--widths", "64,128", "mup=null"], "mup: the run does not use it"),
        (["--widths", "64,128", "phases.prose.mixture={prase: 1.0}"], "mixture.prase: no such source"),
        (["--widths", "64,128", "data.sources.prose=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_anything_is_made(
    narrow_file: Path, one_rank: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    refused = call(narrow_file, "--cluster", one_rank, "--out", tmp_path / "sweep", *words)
    assert refused.returncode == 2, refused.stderr
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "sweep").exists()


def test_without_slurm_a_slurm_profile_is_refused(narrow_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "there.yaml"
    profile.write_text(
        yaml.safe_dump({"name": "there", "executor": "slurm", "ranks_per_node": 1, "time_limit": "10min"})
    )
    program = [sys.executable, str(ROOT / "tools/mup_sweep.py"), str(narrow_file), "--widths", "64,128"]
    refused = subprocess.run(
        [*program, "--cluster", str(profile), "--out", str(tmp_path / "sweep")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert refused.returncode == 2, refused.stderr
    assert "sbatch: not found" in refused.stderr
