"""Token stores built by jobs on the private Slurm: ranks of srun, arrays, jobs that are preempted or lose a task."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from stories import wait_for

from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.harvest import harvest
from crystal_hpc.data.tokenizer import train_tokenizer
from crystal_hpc.jobs import slurm

REPOSITORY = Path(__file__).parents[2]
SHARD = 100_000
Submit = Callable[..., str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some ten seconds of work for one process, in twelve files, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    harvest(folder / "raw", 4_000_000, held_out=0)
    train_tokenizer([folder / "raw" / "prose.jsonl"], folder / "tokenizer", 1000)
    lines = (folder / "raw" / "code.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "files").mkdir()
    for number in range(12):
        (folder / "files" / f"{number}.jsonl").write_text("".join(lines[number::12]), encoding="utf-8")
    shutil.rmtree(folder / "raw")
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, bytes]:
    """The files of the store as one process builds it."""
    options = Options(shard_tokens=SHARD, name="store")
    assert build_store([corpus / "files"], corpus / "store", corpus / "tokenizer", options) is not None
    return content(corpus / "store")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build.json"}


def words(corpus: Path, out: Path) -> list[str]:
    asked = [corpus / "files", "--tokenizer", corpus / "tokenizer", "--out", out, "--shard-tokens", SHARD]
    return [*map(str, asked), "--name", "store"]


@pytest.fixture
def sbatch(devcluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submits slurm/build.sbatch with options of sbatch and words of the build; returns the job's id."""
    monkeypatch.setenv("CRYSTAL_PYTHON", sys.executable)

    def submit(options: list[str], build: list[str]) -> str:
        script = str(REPOSITORY / "slurm" / "build.sbatch")
        command = ["sbatch", "--parsable", "--partition=normal", f"--output={tmp_path}/%A_%a.out", *options, script]
        return subprocess.run(
            [*command, *build], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()  # fmt: skip

    return submit


def is_rank(process: psutil.Process, rank: int, out: Path) -> bool:
    """Whether a process is this rank of the build of a store."""
    with contextlib.suppress(psutil.Error):
        mine = str(out) in process.cmdline() and "crystal_hpc.cli" in process.cmdline()
        return mine and process.environ().get("SLURM_PROCID") == str(rank) and process.name() != "srun"
    return False


def wait_until_over(job: str) -> None:
    wait_for(lambda: not slurm.queue([job]), f"job {job} to end")


def test_ranks_of_one_job_on_three_nodes_build_the_same_bytes(
    sbatch: Submit, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    wait_until_over(sbatch(["--nodes=3", "--ntasks-per-node=1"], words(corpus, tmp_path / "store")))
    assert content(tmp_path / "store") == expected


def test_the_tasks_of_an_array_build_the_same_bytes(
    sbatch: Submit, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    wait_until_over(sbatch(["--array=3-5"], words(corpus, tmp_path / "store")))
    assert content(tmp_path / "store") == expected


def test_ranks_of_srun_with_pmi2_build_the_same_bytes(
    devcluster: Any, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "build_store.py")]
    done = subprocess.run(
        ["srun", "--partition=normal", "--mpi=pmi2", "-n", "2", *tool, *words(corpus, tmp_path / "store")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("documents") == 1, done.stderr
    assert content(tmp_path / "store") == expected


def test_a_preempted_build_goes_back_to_the_queue_and_on_from_its_parts(
    sbatch: Submit, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    job = sbatch(["--nodes=4", "--ntasks-per-node=1", "--exclusive"], words(corpus, out))
    first = wait_for(lambda: list((out / "parts").glob("part-*.json")), "a first part")
    subprocess.run(["srun", "--partition=urgent", "--nodes=4", "--exclusive", "true"], check=True, timeout=100)
    assert all(part.exists() for part in first) or (out / "store.json").exists()
    wait_for(lambda: (out / "store.json").exists(), "the store", 150)
    wait_until_over(job)
    assert content(out) == expected
    log = next(tmp_path.glob("*.out")).read_text()
    assert "going on from what is finished" in log


def test_a_task_that_is_killed_leaves_its_work_to_the_others(
    sbatch: Submit, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    job = sbatch(["--nodes=2", "--ntasks-per-node=1"], words(corpus, out))
    wait_for(lambda: list((out / "parts").glob("part-*.json")), "a first part")
    (victim,) = [process for process in psutil.process_iter() if is_rank(process, 1, out)]
    victim.kill()
    wait_until_over(job)
    assert content(out) == expected
