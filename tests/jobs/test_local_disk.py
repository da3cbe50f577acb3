"""Staging by a local job and by hand: the samples are those of the ledger, and what cannot be staged is a warning."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from crystal_hpc import files
from crystal_hpc.cli import main
from crystal_hpc.config.load import load_cluster, load_run
from crystal_hpc.data.slices import SliceFile, make_cut, open_reading
from crystal_hpc.data.sources import read_sources
from crystal_hpc.errors import ConfigError
from crystal_hpc.jobs import journal, local_disk, submit
from crystal_hpc.jobs.status import log_lines
from crystal_hpc.report.ledger import check_ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepared(tiny_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a run that has not begun."""
    return submit.prepare(load_run(write_config(tiny_config)), None, tmp_path / "runs")


def crystal(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(config: Path, cluster: Path, tmp_path: Path, staging: dict[str, Any]) -> tuple[Path, str]:
    """A local job of two ranks from start to end: its folder and what rank 0 said."""
    content = yaml.safe_load(cluster.read_text()) | {"staging": staging}
    cluster.write_text(yaml.safe_dump(content))
    machine = load_cluster(cluster)
    folder = submit.prepare(load_run(config), machine, tmp_path / "runs")
    for job in submit.start(folder, machine):
        job.wait()
    assert [entry["outcome"] for entry in journal.read_attempts(folder)] == ["finished"]
    return folder, "".join(log_lines(folder, 0, 1000, False))


def test_a_local_job_copies_the_stores_before_it_trains(
    tiny_config: dict[str, Any], write_config: Callable[..., Path], cluster_file: Path, tmp_path: Path
) -> None:
    staging = {"mode": "whole", "folder": str(tmp_path / "disk")}
    folder, said = trained(write_config(tiny_config), cluster_file, tmp_path, staging)
    assert "12 steps" in check_ledger(folder)
    assert "staged: " in said and "reading shared storage" not in said
    assert len(list((tmp_path / "disk" / "crystal" / "stores").glob("*/store.json"))) == 2


def test_a_local_job_without_a_disk_warns_and_trains(
    tiny_config: dict[str, Any], write_config: Callable[..., Path], cluster_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = {**tiny_config, "phases": tiny_config["phases"][:1]}
    staging = {"mode": "slice", "span": 2, "folder": str(tmp_path / "file")}
    folder, said = trained(write_config(config), cluster_file, tmp_path, staging)
    assert "5 steps" in check_ledger(folder)
    assert said.count("slices fail on this node") == 1


def test_whole_stores_are_copied_by_hand_and_kept_the_second_time(prepared: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "crystal_hpc.cli", "data", "stage", str(prepared), "--phase", "code"]
    words += ["--folder", f"{tmp_path}/$PLACE"]
    environ = {**os.environ, "PLACE": "here", "PYTHONPATH": str(ROOT)}
    said = [subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stderr for _ in range(2)]
    size = sum(
        shard["bytes"]
        for name in ("prose", "code")
        for shard in files.read_json(Path(load_run(prepared / "run.yaml").data.sources[name]) / "store.json")["shards"]
    )
    assert f"in {tmp_path}/here: {size} bytes copied, 0 kept, {size} read here" in said[0]
    assert f"in {tmp_path}/here: 0 bytes copied, {size} kept, 0 read here" in said[1]


def test_a_slice_is_cut_by_hand(prepared: Path, tmp_path: Path) -> None:
    done = crystal("data", "stage", prepared, "--phase", "code", "--folder", tmp_path, "--mode", "slice",
                   "--steps", "2-4", "--rank", 1, "--size", 2)  # fmt: skip
    assert done.exit_code == 0, done.output
    run = load_run(prepared / "run.yaml")
    sources = read_sources(run)
    cut, reading = make_cut(run, sources, 1, 1, 2, span=2), open_reading(run, sources, 1)
    found = SliceFile(cut, tmp_path, 2, 4)
    assert found.read(3).inputs.tolist() == reading.rows(cut.share.positions(3)).inputs.tolist()


def test_told_to_stop_the_exit_code_says_so(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crystal_hpc.progress.stop_on_signals", lambda: lambda: True)
    for mode in ("whole", "slice"):
        done = crystal("data", "stage", prepared, "--phase", "code", "--folder", tmp_path, "--mode", mode)
        assert done.exit_code == local_disk.STOPPED
        assert "the same command goes on" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--phase", "cod"], "has no phase 'cod'; choose from prose, code, adaptation"),
        (["--phase", "code", "--folder", "$CRYSTAL_NONE/x"], "CRYSTAL_NONE is not set here"),
        (["--phase", "code", "--folder", "/proc/1/no"], "/proc/1/no"),
        (["--phase", "code", "--mode", "slice", "--steps", "3-9"], "--steps 3-9: write FIRST-STOP, such as 0-4"),
        (["--phase", "code", "--mode", "slice", "--rank", "2", "--size", "2"], "rank 2 of 2"),
    ],
)
def test_a_mistake_is_one_line(prepared: Path, tmp_path: Path, words: list[str], said: str) -> None:
    folder = [] if "--folder" in words else ["--folder", tmp_path]
    done = crystal("data", "stage", prepared, *words, *folder)
    assert done.exit_code == 2, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]


def test_a_job_submitted_by_hand_is_told_by_its_environment(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRYSTAL_STAGING", raising=False)
    assert local_disk.read_staging(prepared) is None
    monkeypatch.setenv("CRYSTAL_STAGING", "slice")
    found = local_disk.read_staging(prepared)
    assert found is not None and (found.mode, found.folder) == ("slice", "$CRYSTAL_SCRATCH")
    monkeypatch.setenv("CRYSTAL_STAGING", "all")
    with pytest.raises(ConfigError, match="CRYSTAL_STAGING: 'all' is neither `whole` nor `slice`"):
        local_disk.read_staging(prepared)
