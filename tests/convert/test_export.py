"""`crystal export`: the newest checkpoint, one of them, or a share of all."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from trained_runs import Trained

from crystal_hpc.cli import main
from crystal_hpc.convert.export import parse_size
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.manifest import read_manifest


@pytest.fixture
def run_folder(trained: Trained, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A run with checkpoints after steps 3, 4 and 5 (of the same weights)."""
    folder = tmp_path / "run"
    text = (trained.folder / "run.yaml").read_text().replace("tokenizer: tokenizer", f"tokenizer: {tokenizer_folder}")
    for step in (3, 4, 5):
        to = folder / "checkpoints" / "words" / f"step_{step:08d}"
        shutil.copytree(trained.checkpoint("plain"), to)
        dataclasses.replace(read_manifest(to), step=step).write(to)
    (folder / "run.yaml").write_text(text)
    return folder


def export(run_folder: Path, *options: Any) -> Result:
    words = ["export", str(run_folder), "--verify", "weights", *map(str, options)]
    result = CliRunner().invoke(main, words)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def exports(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "exports").iterdir())


def test_the_newest_checkpoint_is_exported_unless_another_is_named(run_folder: Path) -> None:
    assert "verified on 27 tensors" in export(run_folder).output
    assert exports(run_folder) == ["words-00000005"]
    export(run_folder, "--step", 3, "--shard-size", "30KB")
    assert exports(run_folder) == ["words-00000003", "words-00000005"]
    marker = json.loads((run_folder / "exports" / "words-00000003" / "export.json").read_text())
    assert (marker["step"], marker["shard_bytes"], marker["format"]) == (3, 30_000, "crystalcoder")
    assert "no such checkpoint; there are: words 3, words 4, words 5" in failed(export(run_folder, "--step", 6))


def failed(result: Result) -> str:
    assert result.exit_code == 2
    said = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return said[-1]


def test_shares_make_up_all_and_leave_alone_what_is_there(run_folder: Path) -> None:
    assert export(run_folder, "--share", "1/2").exit_code == 0
    assert exports(run_folder) == ["words-00000004"]
    before = (run_folder / "exports" / "words-00000004" / "export.json").stat().st_mtime_ns
    result = export(run_folder, "--all")
    assert result.exit_code == 0 and result.output.count("was exported already") == 1
    assert exports(run_folder) == ["words-00000003", "words-00000004", "words-00000005"]
    assert (run_folder / "exports" / "words-00000004" / "export.json").stat().st_mtime_ns == before
    assert export(run_folder, "--share", "7/8").exit_code == 0, "nothing to do"


def test_an_export_of_other_options_is_not_what_was_asked_for(run_folder: Path) -> None:
    assert export(run_folder).exit_code == 0
    assert "was exported already" in export(run_folder, "--skip-done").output
    assert "holds an export already" in (failed(export(run_folder)))
    assert "holds an export already" in (failed(export(run_folder, "--skip-done", "--dtype", "bfloat16")))
    assert export(run_folder, "--skip-done", "--dtype", "bfloat16", "--overwrite").exit_code == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": {"model.safetensors": 3}}'])
def test_an_export_that_is_damaged_is_not_what_was_asked_for(run_folder: Path, content: str) -> None:
    assert export(run_folder).exit_code == 0
    (run_folder / "exports" / "words-00000005" / "export.json").write_text(content)
    assert "holds an export already" in (failed(export(run_folder, "--skip-done")))
    assert export(run_folder, "--skip-done", "--overwrite").exit_code == 0
    (run_folder / "exports" / "words-00000005" / "model.safetensors").unlink()
    assert "holds an export already" in (failed(export(run_folder, "--skip-done")))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modeling_crystalcoder.py"])
def test_an_export_that_lacks_a_file_or_has_another_is_not_what_was_asked_for(run_folder: Path, name: str) -> None:
    assert export(run_folder).exit_code == 0
    path = run_folder / "exports" / "words-00000005" / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert "holds an export already" in (failed(export(run_folder, "--skip-done")))
    path.unlink()
    assert "holds an export already" in (failed(export(run_folder, "--skip-done")))


def test_an_export_with_another_tokenizer_is_not_what_was_asked_for(run_folder: Path, tokenizer_folder: Path) -> None:
    assert export(run_folder).exit_code == 0
    text = (tokenizer_folder / "tokenizer.json").read_text().replace("w90", "W90")
    (run_folder / "tokenizer.json").write_text(text)
    config = run_folder / "run.yaml"
    config.write_text(config.read_text().replace(str(tokenizer_folder), str(run_folder / "tokenizer.json")))
    assert "holds an export already" in (failed(export(run_folder, "--skip-done")))


def test_an_export_that_was_not_verified_is_verified_when_it_is_asked_for_again(run_folder: Path) -> None:
    marker = run_folder / "exports" / "words-00000005" / "export.json"
    for before, options in (("none", ["--no-verify"]), ("none", ["--no-verify", "--all"]), ("weights", ["--all"])):
        result = export(run_folder, *options)
        assert result.exit_code == 0 and json.loads(marker.read_text())["verified"] == before
    assert "words-00000005: was exported already\nverified on 27 tensors" in result.output
    assert "verified" not in export(run_folder, "--skip-done").output
    weights = marker.with_name("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    marker.write_text(marker.read_text().replace('"verified": "weights"', '"verified": "none"'))
    assert "is not what was written, by its digest" in failed(export(run_folder, "--skip-done"))


def test_overwriting_makes_an_export_again_that_is_there(run_folder: Path) -> None:
    assert export(run_folder, "--all").exit_code == 0
    weights = run_folder / "exports" / "words-00000004" / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + b"\x55")  # of the same size, so that nobody asks
    assert "was exported already" not in export(run_folder, "--all", "--overwrite").output
    assert weights.read_bytes() == right


def test_a_checkpoint_that_is_damaged_does_not_stop_the_others(run_folder: Path) -> None:
    path = run_folder / "checkpoints" / "words" / "step_00000004" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = export(run_folder, "--all")
    assert "1 of 3 checkpoints could not be exported" in (failed(result))
    assert "error: " in result.output and "step_00000004" in result.output
    assert exports(run_folder) == ["words-00000003", "words-00000005"]


def test_a_format_that_cannot_express_the_model_is_refused_with_the_reason(run_folder: Path) -> None:
    said = failed(export(run_folder, "--format", "llama"))
    assert "model.norm" in said
    assert "gpt2: no such format; choose from crystalcoder" in (failed(export(run_folder, "--format", "gpt2")))


@pytest.mark.parametrize("share", ["2/2", "1", "a/b", "-1/2", "1/0", ""])
def test_a_share_must_be_one(share: str, run_folder: Path) -> None:
    assert "is not like 0/8" in export(run_folder, f"--share={share}").output or not share


def test_folders_may_be_called_as_crystals_branches_are(run_folder: Path) -> None:
    export(run_folder, "--name", "CrystalCoder_{phase}_checkpoint_{step:06d}")
    assert exports(run_folder) == ["CrystalCoder_words_checkpoint_000005"]
    again = export(run_folder, "--share", "2/3", "--name", "CrystalCoder_{phase}_checkpoint_{step:06d}")
    assert "was exported already" in again.output


@pytest.mark.parametrize("name", ["", "{phase}", "{step}", "{phase}/{step}", "{phase}{step}{seed}", "{phase}{step:s}"])
def test_a_name_must_tell_phases_and_steps_apart(name: str, run_folder: Path) -> None:
    assert "write it with {phase} and {step}" in failed(export(run_folder, "--name", name))


@pytest.mark.parametrize("name", ["{phase}{step}", "{step:06d}{phase}", "a{phase}0{step:06d}"])
def test_a_name_must_say_where_a_step_begins(name: str, run_folder: Path) -> None:
    assert "no digit between {phase} and {step}" in failed(export(run_folder, "--name", name))


@pytest.mark.parametrize("suffix", [".old", ".lock", ".pending"])
def test_a_folder_is_not_called_as_what_is_beside_another(suffix: str, run_folder: Path, tmp_path: Path) -> None:
    said = failed(export(run_folder, "--out", tmp_path / f"demo{suffix}"))
    assert f"names that end with {suffix} are for work in progress" in said
    assert said == failed(export(run_folder, "--skip-done", "--out", tmp_path / f"demo{suffix}"))


def test_options_that_exclude_each_other_are_refused(run_folder: Path) -> None:
    for options in (("--all", "--step", 3), ("--share", "0/2", "--out", "x")):
        assert "without --out and --step" in export(run_folder, *options).output
    assert "without --out" in export(run_folder, "--name", "{phase}-{step}", "--out", "x").output
    assert not (run_folder / "exports").exists()


def test_sizes_are_written_as_people_write_them() -> None:
    assert [parse_size(text) for text in ("5GB", "500 mb", "1.5kB", "2GiB", "7", "1T")] == [
        5 * 10**9, 5 * 10**8, 1500, 2 << 30, 7, 10**12,
    ]  # fmt: skip
    for text in ("", "GB", "-5GB", "0", "5PB", "1e9", "5GBs", "1.2.3GB"):
        with pytest.raises(CheckpointError, match="is no size of a file"):
            parse_size(text)
