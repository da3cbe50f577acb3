"""What a run's stores and tokenizer must have for its fill-in-the-middle is found before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.data import fim
from crystal_hpc.data.sources import read_source_info, read_sources
from crystal_hpc.errors import ConfigError, StoreError


@pytest.fixture
def wanting(tiny_config: dict[str, Any], write_config: Callable[..., Path]) -> Callable[..., Run]:
    """The tiny run with FIM in its second phase: wanting(rate=0.5)."""

    def make(**settings: Any) -> Run:
        tiny_config["phases"][1]["fim"] = {"code": settings}
        return load_run(write_config(tiny_config))

    return make


def test_a_tokenizer_without_sentinels_is_a_line_on_the_screen(
    wanting: Callable[..., Run], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    read_sources(wanting(rate=0.5))
    path = Path(tiny_config["data"]["tokenizer"]) / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for token in value["added_tokens"]:
        token["content"] = token["content"].replace("fim_suffix", "other")
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    tiny_config["data"]["tokenizer"] = str(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError) as caught:
        read_sources(wanting(rate=0.5))
    (said,) = [problem for problem in caught.value.problems if "fim" in problem]
    assert said.startswith("phases.1.fim.code: ") and "the tokenizer has no <|fim_suffix|> (nor the same" in said
    with pytest.raises(StoreError, match=r"has no <\|fim_suffix\|>"):
        fim.load_fims(wanting(rate=0.5))
    with pytest.raises(ConfigError) as caught:
        read_sources(wanting(rate=0.0))
    assert not [problem for problem in caught.value.problems if "fim" in problem], "fim that never happens needs none"


def test_the_tokenizer_is_loaded_only_where_a_phase_needs_it(wanting: Callable[..., Run]) -> None:
    without = wanting(rate=0.0)
    elsewhere = without.model_copy(update={"data": without.data.model_copy(update={"tokenizer": "nowhere"})})
    assert fim.load_fims(elsewhere) == [None, None, None]
    loaded = fim.load_fims(wanting(rate=0.5))
    assert [phase is None for phase in loaded] == [True, False, True]


def test_a_folder_without_a_store_is_still_told_apart_from_rows(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no token store at"):
        read_source_info(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="not a token store"):
        read_source_info(tmp_path)
    (tmp_path / "build.json").write_text('{"shards": 3}')
    (tmp_path / "shard-00000.h5").write_text("")
    with pytest.raises(StoreError, match="half-written, 1 of 3 shards"):
        read_source_info(tmp_path)
