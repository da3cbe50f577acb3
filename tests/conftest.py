"""What tests of several parts share: a tiny corpus with stores, a tiny run on it, and a summary of what was skipped."""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from crystal_hpc.data.build import build_store
from crystal_hpc.data.tokenizer import train_tokenizer

SYLLABLES = [consonant + vowel for consonant in "bdklmn" for vowel in "aeiou"]


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a module stays in one process, for its fixtures; so do all tests on one private Slurm.

    Those come first: they mostly wait, and the two processors should have work until the end.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    on_slurm = {"_four_nodes", "_accounted"}
    for item in items:
        group = "slurm" if on_slurm & set(getattr(item, "fixturenames", ())) else item.nodeid.partition("::")[0]
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: not on_slurm & set(getattr(item, "fixturenames", ())))


def made_up_text(chance: random.Random) -> str:
    """Some words nobody has seen, most of which come again."""
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(20)]
    return " ".join(chance.choices(words, k=60))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and stores `prose`, `code` and `held-out` of some ten thousand tokens each."""
    folder = tmp_path_factory.mktemp("tiny-data")
    for number, name in enumerate(("prose", "code", "held-out")):
        chance = random.Random(number)
        lines = [json.dumps({"text": made_up_text(chance), "source": name}) for _ in range(120)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    train_tokenizer([folder / "prose.jsonl"], folder / "tokenizer", 512)
    for name in ("prose", "code", "held-out"):
        build_store([folder / f"{name}.jsonl"], folder / name, folder / "tokenizer")
    return folder


@pytest.fixture
def tiny_config(tiny_data: Path) -> dict[str, Any]:
    """A run of three phases and twelve steps that crosses boundaries of mixture, schedule and optimizer state."""

    def phase(name: str, steps: int, mixture: dict[str, float], **more: Any) -> dict[str, Any]:
        rate = {"peak": 0.01, "warmup_steps": 1, "end": 0.001}
        shape = {"sequence_length": 16, "batch_size": 8, "steps": steps}
        return {"name": name, **shape, "mixture": mixture, "learning_rate": rate, **more}

    return {
        "name": "tiny",
        "precision": "fp32",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 536, "init_std": 0.073},
        "mup": {"base_hidden": 16, "embedding_multiplier": 14.6, "output_multiplier": 2.22},
        "parallel": {"micro_batch": 2, "distributed_optimizer": False},
        "data": {
            "tokenizer": str(tiny_data / "tokenizer"),
            "sources": {"prose": str(tiny_data / "prose"), "code": str(tiny_data / "code")},
            "held_out": {"held-out": str(tiny_data / "held-out")},
        },
        "evaluation": {"rows": 8},
        "phases": [
            phase("prose", 5, {"prose": 1.0}),
            phase("code", 4, {"code": 0.6, "prose": 0.4}, checkpoint_every=2),
            phase("adaptation", 3, {"code": 1.0}, optimizer_state="fresh"),
        ],
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a config to a YAML file of its own and returns its path."""

    def write(config: dict[str, Any], name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    """A local cluster of two ranks."""
    path = tmp_path / "cluster.yaml"
    content = {"name": "here", "executor": "local", "ranks_per_node": 2, "time_limit": "10min", "signal_delay": "30s"}
    path.write_text(yaml.safe_dump({**content, "environment": {"OMP_NUM_THREADS": "1"}}))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, which a test may remount."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place]).returncode:
        pytest.skip("a small file system needs root and mount")
    yield place
    subprocess.run(["umount", place], check=True)
