"""A narrow run whose muP can be checked in seconds, and a local cluster of one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def narrow(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """One layer, heads 16 wide, tuned at a width of 64."""
    model = {**tiny_config["model"], "layers": 1, "hidden": 64, "heads": 4, "ffn": 170}
    parallel = {"micro_batch": 8, "tensor": 2}
    return {**tiny_config, "model": model, "parallel": parallel, "mup": {**tiny_config["mup"], "base_hidden": 64}}


@pytest.fixture
def narrow_file(narrow: dict[str, Any], write_config: Callable[[dict[str, Any]], Path]) -> Path:
    return write_config(narrow)


@pytest.fixture
def one_rank(tmp_path: Path) -> Path:
    """A local cluster of one rank."""
    path = tmp_path / "one.yaml"
    content = {"name": "here", "executor": "local", "ranks_per_node": 1, "time_limit": "10min", "signal_delay": "30s"}
    path.write_text(yaml.safe_dump(content))
    return path
