"""The command line on bad input: one clear line, exit code 2, nothing lost."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from crystal_hpc.cli import main
from crystal_hpc.config.load import load_cluster, load_run
from crystal_hpc.data.build import build_store
from crystal_hpc.data.tokenizer import train_tokenizer
from crystal_hpc.jobs.submit import prepare

Config = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def crystal() -> Callable[..., Result]:
    """Runs a command in this process."""
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def submit(
    crystal: Callable[..., Result], write_config: Write, cluster_file: Path, tmp_path: Path
) -> Callable[..., Result]:
    """`crystal submit` of a config, which these tests all expect to be refused."""

    def run(config: Config, *overrides: str) -> Result:
        return crystal(
            "submit", write_config(config), *overrides, "--cluster", cluster_file, "--runs", tmp_path / "runs"
        )

    return run


def refused(result: Result, *parts: str) -> None:
    """Exit code 2, one line of error, and in it all parts."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    for part in parts:
        assert part in lines[0]


def test_an_unknown_key_is_named_with_the_nearest_valid_one(submit: Callable[..., Result], tiny_config: Config) -> None:
    refused(submit(tiny_config, "model.hiden=3"), "model.hiden", "unknown key", "'hidden'")


def test_a_wrong_type_is_named_with_what_was_given(submit: Callable[..., Result], tiny_config: Config) -> None:
    refused(submit(tiny_config, "model.layers=two"), "model.layers", "valid integer", "'two'")


def test_weights_that_do_not_sum_to_one_are_refused(submit: Callable[..., Result], tiny_config: Config) -> None:
    result = submit(tiny_config, "phases.code.mixture={code: 0.6, prose: 0.3}")
    refused(result, "phases.1.mixture", "sum to 0.9, not 1")


def test_every_error_is_told_at_once(submit: Callable[..., Result], tiny_config: Config) -> None:
    result = submit(tiny_config, "model.hiden=3", "precision=fp64", "phases.prose.batch_size=0")
    assert result.exit_code == 2
    assert result.output.count("error: ") == 3


def test_a_missing_store_is_named_with_the_command_that_builds_it(
    submit: Callable[..., Result], tiny_config: Config
) -> None:
    result = submit(tiny_config, "data.sources.code=/nowhere/code")
    refused(result, "data.sources.code", "no token store at /nowhere/code", "crystal data build")


def test_a_half_written_store_is_refused(
    submit: Callable[..., Result], tiny_config: Config, tiny_data: Path, tmp_path: Path
) -> None:
    build_store([tiny_data / "code.jsonl"], tmp_path / "half", tiny_data / "tokenizer")
    (tmp_path / "half" / "store.json").unlink()
    result = submit(tiny_config, f"data.sources.code={tmp_path / 'half'}")
    refused(result, "data.sources.code", "half-written", "run the same build command again")


def test_a_store_made_with_another_tokenizer_is_refused(
    submit: Callable[..., Result], tiny_config: Config, tiny_data: Path, tmp_path: Path
) -> None:
    train_tokenizer([tiny_data / "code.jsonl"], tmp_path / "other", 512)
    build_store([tiny_data / "code.jsonl"], tmp_path / "code", tmp_path / "other")
    result = submit(tiny_config, f"data.sources.code={tmp_path / 'code'}")
    refused(result, "data.sources.code", "made with another tokenizer")


def test_a_vocabulary_smaller_than_the_data_is_refused(submit: Callable[..., Result], tiny_config: Config) -> None:
    refused(submit(tiny_config, "model.vocab_size=500"), "model.vocab_size: 500 is smaller than the tokenizer's 534")


def test_a_sequence_longer_than_a_store_is_refused(submit: Callable[..., Result], tiny_config: Config) -> None:
    result = submit(tiny_config, "phases.adaptation.sequence_length=10000000")
    refused(result, "phases.2.sequence_length", "longer than the whole store 'code'")


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused(
    submit: Callable[..., Result], tiny_config: Config
) -> None:
    refused(
        submit(tiny_config, "parallel.tensor=3", "model.vocab_size=537"),
        "parallel.tensor: 3 does not divide model.heads = 4",
    )


def test_tensor_parallelism_that_does_not_divide_the_vocabulary_is_refused_with_a_size_that_fits(
    submit: Callable[..., Result], tiny_config: Config
) -> None:
    result = submit(tiny_config, "parallel.tensor=2", "model.vocab_size=535")
    refused(result, "model.vocab_size: 535 is not a multiple of parallel.tensor = 2; make it 536")


def test_a_layout_that_does_not_fit_the_ranks_is_refused(submit: Callable[..., Result], tiny_config: Config) -> None:
    refused(submit(tiny_config, "parallel.tensor=4"), "tensor x pipeline = 4 does not divide the 2 ranks")


def test_a_run_name_that_exists_with_another_config_is_refused_with_the_difference(
    submit: Callable[..., Result],
    tiny_config: Config,
    tmp_path: Path,
    write_config: Write,
    cluster_file: Path,
) -> None:
    folder = prepare(load_run(write_config(tiny_config)), load_cluster(cluster_file), tmp_path / "runs")
    before = (folder / "run.yaml").read_bytes()
    refused(submit(tiny_config, "phases.code.steps=5"), "another config", "phases.1.steps: 4 there, 5 here")
    assert (folder / "run.yaml").read_bytes() == before


def test_a_missing_cluster_file_and_a_missing_run_file_are_one_line_each(
    crystal: Callable[..., Result], tmp_path: Path
) -> None:
    refused(crystal("plan", tmp_path / "none.yaml"), "none.yaml", "no such file")
    for command in (["status"], ["logs"], ["cancel"], ["ledger"], ["report"], ["export"]):
        refused(crystal(*command, tmp_path / "none"), "none")


def test_a_full_disk_is_one_line_and_with_some_space_the_same_command_gets_further(
    crystal: Callable[..., Result], tiny_config: Config, write_config: Write, cluster_file: Path, small_disk: Path
) -> None:
    words = ["submit", write_config(tiny_config), "--cluster", cluster_file, "--runs", small_disk / "runs"]
    (small_disk / "filler").write_bytes(b"x" * 4096 * 15)
    refused(crystal(*words), str(small_disk), "the disk is full; free some space and run the same command again")
    assert not list(small_disk.glob("runs/tiny/*.pending"))
    (small_disk / "filler").unlink()
    folder = prepare(load_run(words[1]), load_cluster(cluster_file), small_disk / "runs")
    assert load_run(folder / "run.yaml").name == "tiny"


def test_a_read_only_disk_is_one_line(
    crystal: Callable[..., Result], tiny_config: Config, write_config: Write, cluster_file: Path, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = crystal("submit", write_config(tiny_config), "--cluster", cluster_file, "--runs", small_disk / "runs")
    refused(result, str(small_disk), "the file system is read-only; choose a folder that can be written")


def test_help_names_every_command(crystal: Callable[..., Result]) -> None:
    result = crystal("--help")
    assert result.exit_code == 0
    for command in (
        "config",
        "plan",
        "submit",
        "status",
        "logs",
        "cancel",
        "report",
        "data",
        "export",
        "demo",
        "ledger",
    ):
        assert command in result.output


def test_the_plan_shows_tokens_and_epochs_of_each_source(
    crystal: Callable[..., Result], tiny_config: Config, write_config: Write
) -> None:
    result = crystal("plan", write_config(tiny_config))
    assert result.exit_code == 0
    assert "12 steps in 3 phases" in result.output
    assert "100.0%" in result.output


def test_a_plan_without_the_data_is_shown_and_refused(
    crystal: Callable[..., Result], tiny_config: Config, write_config: Write
) -> None:
    result = crystal("plan", write_config(tiny_config), "data.sources.code=/nowhere")
    refused(result, "data.sources.code: no token store at /nowhere")
    assert "12 steps in 3 phases" in result.output


def test_the_plan_of_memory_needs_no_data_and_a_cluster_that_fits(
    crystal: Callable[..., Result], tiny_config: Config, write_config: Write, cluster_file: Path
) -> None:
    tiny_config["data"]["sources"]["code"] = "not/there"
    words = ["plan", write_config(tiny_config), "--memory", "--cluster", cluster_file]
    result = crystal(*words)
    assert result.exit_code == 0
    assert result.output.startswith("memory of each GPU: 2 ranks (DP 2), fp32")
    refused(crystal(*words, "parallel.tensor=4"), "tensor x pipeline = 4 does not divide the 2 ranks")
    refused(crystal("plan", words[1]), "not/there")


def test_config_check_and_schema_answer(
    crystal: Callable[..., Result], tiny_config: Config, write_config: Write
) -> None:
    assert "a valid run, 'tiny', 3 phases" in crystal("config", "check", write_config(tiny_config)).output
    assert '"phases"' in crystal("config", "schema").output
    assert '"signal_delay"' in crystal("config", "schema", "cluster").output
    assert (
        "distributed_optimizer: true"
        in crystal("config", "show", write_config(tiny_config), "parallel.distributed_optimizer=true").output
    )
