"""Real checkpoints become folders that Transformers loads and that compute what Megatron computes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trained_runs import REPOSITORY, Trained

from crystal_hpc.config import derive
from crystal_hpc.convert import sample, weights
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.errors import CheckpointError, CrystalError, DiskError


@pytest.fixture(scope="module")
def exported(trained: Trained, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "tiny"
    weights.export(trained.checkpoint("plain"), trained.run(), tokenizer_folder, out)
    return out


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(trained.checkpoint("plain"), tmp_path / "checkpoint"))


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_the_same_weights_give_the_same_bytes_whatever_layout_saved_them(
    layout: str, trained: Trained, exported: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    weights.export(trained.checkpoint(layout), trained.run(), tokenizer_folder, tmp_path / "out")
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        if name == weights.MARKER:  # which also says which checkpoint it was
            ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path / "out", exported))
            assert ours.pop("manifest") != theirs.pop("manifest") and ours == theirs
        else:
            assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes(), name


@pytest.mark.parametrize("case", ["plain", "tensor", "plain in bfloat16", "bf16"])
def test_the_export_computes_what_the_trained_model_computes(case: str, trained: Trained) -> None:
    result = trained.results[case]
    assert result["max_difference"] <= result["allowed"] == 1e-4 * result["largest_logit"]
    assert result["largest_logit"] > 0.5
    assert result["tokens"] == 2 * 48


def test_an_export_with_gate_and_value_swapped_fails_verification(trained: Trained) -> None:
    assert "its logits differ from the checkpoint's by up to" in trained.results["spoiled"]["error"]


def test_transformers_loads_the_folder_with_all_that_was_configured(trained: Trained, exported: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    run = trained.run()
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    model_config = model.config
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == derive.parameters(run.model)
    assert (model_config.n_embd, model_config.n_inner, model_config.rotary_dim) == (32, 42, 4)
    assert (model_config.bos_token_id, model_config.eos_token_id) == (1, 2)
    assert model_config.mup_width_scale == 16 / 32
    assert model_config.n_positions == run.phases[0].sequence_length
    assert model.generation_config.eos_token_id == 2
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, sample.load(exported)(tokens).logits)
        body = AutoModel.from_pretrained(exported, trust_remote_code=True)
        assert torch.equal(body(tokens).last_hidden_state, model.transformer(tokens).last_hidden_state)


def test_small_shards_hold_the_same_tensors_and_load_the_same(trained: Trained, exported: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int, str]] = []
    summary = weights.export(
        trained.checkpoint("plain"),
        trained.run(),
        None,
        tmp_path / "out",
        shard_bytes=40_000,
        on_progress=lambda *told: seen.append(told),
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == summary.weight_files > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    whole, parts = published(exported), published(tmp_path / "out")
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], part) for name, part in parts.items())
    assert index["metadata"]["total_size"] == summary.weight_bytes == 4 * summary.parameters
    assert seen[-1][:3] == ("writing weights", summary.weight_bytes, summary.weight_bytes)
    assert seen[-1][3].startswith("0.0 of 0.0 GB, ")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(sample.load(tmp_path / "out")(tokens).logits, sample.load(exported)(tokens).logits)


def test_bfloat16_rounds_each_weight_once(trained: Trained, exported: Path, tmp_path: Path) -> None:
    weights.export(trained.checkpoint("plain"), trained.run(), None, tmp_path / "out", dtype="bfloat16")
    rounded = published(tmp_path / "out")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in published(exported).items())
    assert sample.load(tmp_path / "out").dtype == torch.bfloat16


def test_all_files_of_an_export_may_be_read_by_the_same_people(exported: Path) -> None:
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


def test_only_the_needed_layer_of_a_stack_is_read(trained: Trained) -> None:
    reader = CheckpointReader(trained.checkpoint("tensor"), trained.run())
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert reader.shape(name) == (84, 32)
    assert reader.read(name).untyped_storage().nbytes() == 84 * 32 * 4


def test_reading_needs_neither_megatron_nor_transformers() -> None:
    code = (
        "import sys, crystal_hpc.convert.weights; print([name in sys.modules for name in ('megatron', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False]"


def test_text_is_generated_from_an_export(exported: Path) -> None:
    greedy = sample.generate(exported, "w1 w2 w3", tokens=5, temperature=0)
    assert greedy == sample.generate(exported, "w1 w2 w3", tokens=5, temperature=0)
    sampled = {sample.generate(exported, "w1 w2 w3", tokens=5, temperature=1.0, seed=seed) for seed in (1, 1, 2)}
    assert len(sampled) == 2
    with pytest.raises(CheckpointError, match="too long: the model was trained on 48"):
        sample.generate(exported, "w1", tokens=47)


def test_the_code_inside_the_folder_is_what_runs_even_under_a_name_seen_before(exported: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exported, tmp_path / exported.name))
    code = other / "modeling_crystalcoder.py"
    code.write_text(code.read_text().replace("self.config.mup_output_alpha", "0"))
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        assert sample.load(exported)(tokens).logits.any()
        assert not sample.load(other)(tokens).logits.any()
        assert sample.load(exported)(tokens).logits.any()


def test_transformers_own_tokenizer_agrees_with_ours(exported: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("w5 w6", add_special_tokens=False) == [8, 9]


def test_a_tokenizer_that_came_with_code_of_its_own_loads_without(
    trained: Trained, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """As Crystal's does: its tokenizer_config.json leads to a file beside it, which does what tokenizer.json says."""
    from transformers import AutoTokenizer

    source = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    code = {"AutoTokenizer": [None, "tokenization_crystalcoder_fast.CrystalCoderTokenizerFast"]}
    config = {"auto_map": code, "tokenizer_class": "CrystalCoderTokenizer", "bos_token": "<s>", "model_max_length": 40}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    weights.export(trained.checkpoint("plain"), trained.run(), source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (tokenizer.bos_token_id, tokenizer.model_max_length) == (1, 40)
    assert tokenizer.encode("w5 w6", add_special_tokens=False) == [8, 9]
    assert (tmp_path / "out" / "special_tokens_map.json").read_bytes() == (
        source / "special_tokens_map.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.norm=rmsnorm", "model.norm: the CrystalCoder format can only express layernorm"),
        ("model.bias=false", "model.bias"),
        ("model.tied_embeddings=false", "model.tied_embeddings"),
        ("model.rotary_interleaved=false", "model.rotary_interleaved"),
        ("model.rotary_base=500000", "model.rotary_base"),
    ],
)
def test_a_model_that_the_format_cannot_express_is_refused(
    override: str, said: str, trained: Trained, tmp_path: Path
) -> None:
    refuse(trained.checkpoint("plain"), trained.run(override), tmp_path / "out", said)


def test_a_run_that_the_checkpoint_does_not_belong_to_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = trained.run("model.norm_epsilon=1e-6")
    refuse(trained.checkpoint("plain"), run, tmp_path / "out", "belongs to a run with another config")


def test_a_checkpoint_that_is_missing_cut_short_or_damaged_is_refused(
    trained: Trained, copied: Path, tmp_path: Path
) -> None:
    run, out = trained.run(), tmp_path / "out"
    refuse(tmp_path / "nowhere", run, out, "no such checkpoint")
    data = copied / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    refuse(copied, run, out, "missing or not of its")
    data.write_bytes(bytes(len(whole)))
    refuse(copied, run, out, "__0_0.distcp: ")  # cannot be read, or has another digest: whoever sees it first
    shutil.copy(trained.checkpoint("plain") / "__0_0.distcp", data)
    (copied / ".metadata").write_bytes(bytes((copied / ".metadata").stat().st_size))
    refuse(copied, run, out, ".metadata: cannot be read")
    (copied / "manifest.json").write_text("{}")
    refuse(copied, run, out, "manifest.json: is of format None")
    (copied / "manifest.json").unlink()
    refuse(copied, run, out, "has no manifest.json")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    trained: Trained, tokenizer_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"x{n}": 100 + n for n in range(50)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"has 150 ids, more than model\.vocab_size = 126"):
        weights.export(trained.checkpoint("plain"), trained.run(), tmp_path, tmp_path / "out")


def test_an_export_is_replaced_only_on_request_and_anything_else_never(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    refuse(trained.checkpoint("plain"), trained.run(), out, "exists and is no export", overwrite=True)
    (out / "thesis.txt").unlink()
    out.rmdir()
    weights.export(trained.checkpoint("plain"), trained.run(), None, out)
    refuse(trained.checkpoint("plain"), trained.run(), out, "holds an export already")
    weights.export(trained.checkpoint("plain"), trained.run(), None, out, dtype="bfloat16", overwrite=True)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file of this process may grow beyond 20 kB, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("small_files_only")
def test_a_disk_that_refuses_leaves_nothing_behind(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"model\.safetensors: the file is larger"):
        weights.export(trained.checkpoint("plain"), trained.run(), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_tool_exports_verifies_and_tells_mistakes_in_one_line(
    trained: Trained, tokenizer_folder: Path, tmp_path: Path
) -> None:
    def convert(*arguments: Any) -> subprocess.CompletedProcess[str]:
        tool = [sys.executable, str(REPOSITORY / "tools/convert_checkpoint.py")]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(
            [*tool, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    checkpoint = trained.checkpoint("plain")
    missing = convert(checkpoint, "out")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "plain/run.yaml: no such file" in missing.stderr
    shutil.copy(trained.folder / "run.yaml", trained.folder / "plain" / "run.yaml")
    done = convert(checkpoint, "out", "--tokenizer", tokenizer_folder)
    assert done.returncode == 0, done.stderr
    assert "verified on 27 tensors and 96 tokens: logits as large as" in done.stdout
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    back = convert("out", "weights")
    assert back.returncode == 0, back.stderr
    assert "from CrystalCoder's format\nverified on 31 tensors and 96 tokens" in back.stdout
    again = convert("weights", "again", "--verify", "weights", "--shard-size", "40kB")
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    for arguments, said in (
        (("out", "more", "--format", "llama"), "--format is for exports, and out is a Hugging Face folder"),
        (("out", "more", "--shard-size", "5 parsecs"), "'5 parsecs' is no size of a file"),
        ((tmp_path, "more"), "is neither a checkpoint (manifest.json) nor a Hugging Face folder"),
        (("out", "weights"), "weights: holds an import already"),
    ):
        refused = convert(*arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and said in refused.stderr


def refuse(checkpoint: Path, run: Any, out: Path, said: str, **options: Any) -> None:
    """An export fails with one line that says `said`, and leaves `out` as it was."""
    before = sorted(out.iterdir()) if out.exists() else None
    with pytest.raises(CrystalError) as caught:
        weights.export(checkpoint, run, None, out, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (sorted(out.iterdir()) if out.exists() else None) == before
