"""Checkpoints converted by slurm/convert.sbatch on the private Slurm: an array, a lone job, and what is refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import psutil
import pytest
from made_generations import make_generation
from made_up import megatron_tensors, stacked
from stories import wait_for

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.convert.export import Options, export_share
from crystal_hpc.convert.hf_folder import MARKER
from crystal_hpc.convert.resume import PROGRESS
from crystal_hpc.jobs import slurm
from crystal_hpc.train.state import Position

REPOSITORY = Path(__file__).parents[2]
SHARD = ("--shard-size", "20KB")  # some files for each of the models, which have 150 KB
Submit = Callable[..., str]


@pytest.fixture
def run_folder(tiny_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path) -> Path:
    """A run with five checkpoints of its model, of other weights each."""
    folder = tmp_path / "run"
    folder.mkdir()
    run = load_run(write_config(tiny_config).rename(folder / "run.yaml"))
    for seed, position in enumerate((Position(0, 2), Position(0, 5), Position(1, 2), Position(1, 4), Position(2, 3))):
        make_generation(folder, run, position, made=stacked(megatron_tensors(run.model, seed)))
    return folder


@pytest.fixture
def expected(run_folder: Path, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """What one process makes of the same run. The jobs compare the logits as well, and say so."""
    alone = copytree(run_folder, tmp_path / "alone")
    assert len(list(export_share(alone, (0, 1), options=Options(verify="weights", shard_bytes=20_000)))) == 5
    made = exports(alone)
    for content in made.values():
        content[MARKER] = content[MARKER].replace(b'"verified": "weights"', b'"verified": "all"')
    return made


def exports(run_folder: Path) -> dict[str, dict[str, bytes]]:
    """Content of every file in the folder of exports, by folder."""
    return {
        folder.name: {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (run_folder / "exports").iterdir()
    }


@pytest.fixture
def sbatch(devcluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submits slurm/convert.sbatch with options of sbatch and words of its own; returns the job's id."""
    monkeypatch.setenv("CRYSTAL_PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)

    def submit(options: list[str], *words: str) -> str:
        script = str(REPOSITORY / "slurm" / "convert.sbatch")
        command = ["sbatch", "--parsable", "--partition=normal", f"--output={tmp_path}/%A_%a.out", *options, script]
        done = subprocess.run([*command, *words], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return submit


def wait_until_over(*jobs: str) -> None:
    wait_for(lambda: not slurm.queue(jobs), f"jobs {jobs} to end")


def wait_for_finished_files(pending: Path) -> dict[str, int]:
    """Waits until a conversion has finished some of its files; returns their times of change."""
    notes = wait_for(lambda: list(files.read_lines(pending / PROGRESS))[2:], "some finished files")
    return times(pending, [note["file"] for note in notes])


def times(folder: Path, names: Any) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in names}


def test_the_tasks_of_an_array_export_every_checkpoint_once_though_one_is_requeued_in_the_middle(
    run_folder: Path, expected: dict[str, dict[str, bytes]], sbatch: Submit, tmp_path: Path
) -> None:
    job = sbatch(["--array=0-1"], str(run_folder), *SHARD)
    out = run_folder / "exports" / "prose-00000002"  # the first of task 0
    pending = out.with_name(f"{out.name}.pending")
    kept = wait_for_finished_files(pending)
    slurm.requeue(f"{job}_0")
    wait_for(lambda: slurm.job_fields(f"{job}_0")["JobState"] == "PENDING", "the task to be gone")
    assert pending.exists() and not out.exists(), "it was in the middle"
    wait_until_over(job)
    assert exports(run_folder) == expected
    assert times(out, kept) == kept, "files that were finished were not written again"
    fields = [slurm.job_fields(f"{job}_{task}") for task in range(2)]
    assert [(about["ExitCode"], about["Restarts"]) for about in fields] == [("0:0", "1"), ("0:0", "0")]
    assert not (tmp_path / "home" / "modules").exists(), "tasks of several nodes would write there at once"
    said = [(tmp_path / f"{job}_{task}.out").read_text() for task in range(2)]
    assert [text.count("logits as large as") for text in said] == [3, 2], said


def test_a_lone_job_that_was_killed_goes_on_when_it_is_put_back_into_the_queue(
    run_folder: Path, expected: dict[str, dict[str, bytes]], sbatch: Submit
) -> None:
    job, out = sbatch([], str(run_folder), *SHARD), run_folder / "exports" / "adaptation-00000003"
    pending = out.with_name(f"{out.name}.pending")
    kept = wait_for_finished_files(pending)
    (process,) = [one for one in psutil.process_iter(["cmdline"]) if str(run_folder) in (one.info["cmdline"] or [])]
    process.kill()
    wait_until_over(job)
    assert slurm.job_fields(job)["JobState"] == "FAILED" and pending.exists() and not out.exists()
    slurm.requeue(job)
    wait_for(lambda: slurm.job_fields(job)["JobState"] == "COMPLETED", "the job to end well")
    assert exports(run_folder) == {out.name: expected[out.name]}, "the newest checkpoint"
    assert times(out, kept) == kept


def test_what_cannot_be_converted_is_refused_with_one_line(sbatch: Submit, tmp_path: Path) -> None:
    here = str(tmp_path)
    gaps = "the array must count from 0 without gaps (--array=0-7), so that each share has a task"
    cases = [
        ([], [], "usage: sbatch slurm/convert.sbatch RUN_FOLDER"),
        ([], [f"{here}/no-such-run"], "no-such-run"),
        ([], [here], "not a run folder (it has no run.yaml)"),
        (["--array=1-2"], [here], gaps),
        (["--array=0-4:2"], [here], gaps),
        (["--array=0,2"], [here], gaps),
    ]
    jobs = [sbatch(options, *words) for options, words, _ in cases]
    wait_until_over(*jobs)
    for job, (options, _, reason) in zip(jobs, cases, strict=True):
        elements = [path.stem for path in tmp_path.glob(f"{job}_*.out")]
        assert len(elements) == (1 if not options else 3 if ":" in options[0] else 2)
        for element in elements:
            (line,) = (tmp_path / f"{element}.out").read_text().splitlines()
            assert reason in line
            assert slurm.job_fields(element if options else job)["ExitCode"] == "2:0"
