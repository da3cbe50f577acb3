"""Groups of one and two waiting ranks, and prepared run folders for them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks as helpers

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Cluster
from crystal_hpc.jobs.submit import prepare


@pytest.fixture(scope="session")
def one() -> Iterator[helpers.Ranks]:
    with helpers.ranks(1) as group:
        yield group


@pytest.fixture(scope="session")
def two() -> Iterator[helpers.Ranks]:
    with helpers.ranks(2) as group:
        yield group


@pytest.fixture
def new_run(tmp_path: Path, tiny_config: dict[str, Any], write_config: Callable[..., Path]) -> Callable[..., Path]:
    """Makes run folders without held-out data: `new_run("name", "parallel.tensor=2")`."""

    def make(name: str, *overrides: str) -> Path:
        run = load_run(write_config({**tiny_config, "name": name}), ("data.held_out={}", *overrides))
        size = run.parallel.tensor * run.parallel.pipeline
        here = Cluster(name="here", executor="local", ranks_per_node=size, time_limit="10min")  # type: ignore[arg-type]
        return prepare(run, here, tmp_path / "runs")

    return make
