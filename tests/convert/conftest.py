"""Checkpoints to convert. Keeps Transformers off the network, and its copies of model code in a folder of this run."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers
from trained_runs import REPOSITORY, RUN, Trained

os.environ["HF_HUB_OFFLINE"] = "1"
MODULES = tempfile.TemporaryDirectory(prefix="hf-modules-")  # removed at the end
os.environ["HF_MODULES_CACHE"] = MODULES.name  # read when transformers is imported


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 100 words, without a tokenizer_config.json."""
    words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(97))]
    engine = Engine(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    engine.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.yaml").write_text(RUN)
    worker = [sys.executable, str(Path(__file__).with_name("megatron_worker.py"))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    ranks = [subprocess.Popen([*worker, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return Trained(folder, json.loads((folder / "results.json").read_text()))
