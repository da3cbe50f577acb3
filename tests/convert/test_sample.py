"""Text from exports of every format: as long as was asked for, the same each time, and refused where it cannot be."""

from pathlib import Path
from typing import Any

import pytest
from made_generations import make_generation
from made_up import megatron_tensors, stacked
from trained_runs import RUN

from crystal_hpc.config.load import load_run
from crystal_hpc.convert import formats, weights
from crystal_hpc.convert.sample import generate
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.state import Position

MODELS = {
    "crystalcoder": (),
    "llama": ("model.norm=rmsnorm", "model.bias=false", "model.rotary_fraction=1.0", "mup=null"),
    "stablelm": ("model.bias=false", "mup=null"),
}


@pytest.fixture(params=MODELS)
def export(request: Any, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """An export of random weights, in each of the formats, that was trained on 48 tokens."""
    (tmp_path / "run.yaml").write_text(RUN)
    run = load_run(tmp_path / "run.yaml", MODELS[request.param])
    checkpoint = make_generation(tmp_path, run, Position(0, 3), made=stacked(megatron_tensors(run.model)))
    weights.export(checkpoint, run, tokenizer_folder, tmp_path / "out", target=formats.by_name(request.param))
    return tmp_path / "out"


def test_a_text_is_continued(export: Path) -> None:
    once, again = (generate(export, "w1 w2", 8, seed=3) for _ in range(2))
    assert once == again and 1 <= len(once.split()) <= 8
    assert generate(export, "w1 w2", 8, temperature=0.0) == generate(export, "w1 w2", 8, temperature=0.0, seed=2)
    with pytest.raises(CheckpointError, match="the model was trained on 48"):
        generate(export, "w1 w2", 48)
    with pytest.raises(CheckpointError, match="0 tokens"):
        generate(export, "w1 w2", 0)
