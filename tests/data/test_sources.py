"""What a run's stores are refused for before anything starts."""

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.data.catalog import rows
from crystal_hpc.data.sources import open_source, read_sources
from crystal_hpc.errors import ConfigError, StoreError

Config = dict[str, Any]
Write = Callable[..., Path]


def test_stores_that_fit_the_run_are_read(tiny_config: Config, write_config: Write) -> None:
    sources = read_sources(load_run(write_config(tiny_config)))
    assert list(sources.training) == ["prose", "code"] and list(sources.held_out) == ["held-out"]


def test_held_out_documents_are_not_trained_on_under_another_path(
    tiny_config: Config, write_config: Write, tmp_path: Path
) -> None:
    shutil.copytree(tiny_config["data"]["sources"]["code"], tmp_path / "copy")
    run = load_run(write_config(tiny_config), (f"data.held_out={{check: {tmp_path / 'copy'}}}",))
    with pytest.raises(ConfigError, match=r"data.held_out.check: .*copy holds the same tokens as the training source"):
        read_sources(run)


def test_a_damaged_block_is_met_on_reading_unless_checks_are_turned_off(
    tiny_config: Config, write_config: Write, tmp_path: Path
) -> None:
    tiny_config["data"]["sources"]["code"] = str(
        shutil.copytree(tiny_config["data"]["sources"]["code"], tmp_path / "c")
    )
    run = load_run(write_config(tiny_config))
    info = read_sources(run).training["code"]
    with open(tmp_path / "c" / "shard-00000.h5", "r+b") as file:
        file.seek(info.shards[0].tokens_at)
        file.write(b"\x07\x00\x08")
    with pytest.raises(StoreError, match=r"c/shard-00000.h5: block 0 of \d+ of the tokens is damaged; delete the file"):
        open_source(info, check=run.data.check).read_row(0, 16)
    run = load_run(write_config(tiny_config), ("data.check=false",))
    inputs, _, _ = open_source(info, check=run.data.check).read_row(0, 16)
    assert inputs[0] == 7


def test_a_store_shorter_than_a_row_is_refused(tiny_config: Config, write_config: Write) -> None:
    run = load_run(write_config(tiny_config), ("phases.code.sequence_length=1000000", "data.most_epochs={code: 1}"))
    with pytest.raises(ConfigError, match=r"phases.1.sequence_length: 1000000 is longer than the whole store"):
        read_sources(run)


def test_a_run_may_read_a_source_as_often_as_allowed_and_not_one_sample_more(
    tiny_config: Config, write_config: Write
) -> None:
    tiny_config["phases"] = tiny_config["phases"][:1]  # prose alone
    tiny_config["parallel"]["micro_batch"] = tiny_config["phases"][0]["batch_size"] = 1
    tokens = read_sources(load_run(write_config(tiny_config))).tokens["prose"]
    count = rows(tokens, tiny_config["phases"][0]["sequence_length"])
    for limit in (1, 2, 2.5):
        allowed = int(Fraction(limit) * count)
        for steps in (allowed, allowed + 1):
            asked = (f"phases.prose.steps={steps}", f"data.most_epochs={{prose: {limit}}}")
            run = load_run(write_config(tiny_config), asked)
            assert derive.phase_samples(run.phases[0]) == steps
            if steps == allowed:
                read_sources(run)
                continue
            with pytest.raises(ConfigError) as caught:
                read_sources(run)
            assert f"data.most_epochs.prose: the plan reads it {limit + 0.01:.2f} times" in str(caught.value)
            assert f"more than the {limit:g} allowed; the limit is passed in phase 'prose'" in str(caught.value)


def test_a_limit_counts_all_phases_and_names_the_one_that_passes_it(tiny_config: Config, write_config: Write) -> None:
    # Rows of another length are other rows, but the same text.
    longer = ("phases.adaptation.sequence_length=32", "phases.adaptation.steps=30")
    tokens = read_sources(load_run(write_config(tiny_config))).tokens["code"]
    before = 0.6 * 4 * 8 * 16 / tokens
    run = load_run(write_config(tiny_config), (*longer, f"data.most_epochs={{code: {2 * before:.4f}, prose: 1}}"))
    with pytest.raises(ConfigError, match=r"passed in phase 'adaptation' \(phases.2\)") as caught:
        read_sources(run)
    assert "prose" not in str(caught.value).split("data.most_epochs")[1]


def test_a_limit_on_no_source_of_the_run_is_refused(tiny_config: Config, write_config: Write) -> None:
    with pytest.raises(ConfigError, match=r"data.most_epochs.cod: no such source; did you mean 'code'\?"):
        load_run(write_config(tiny_config), ("data.most_epochs={cod: 2}",))
    with pytest.raises(ConfigError, match=r"most_epochs"):
        load_run(write_config(tiny_config), ("data.most_epochs={code: 0}",))
