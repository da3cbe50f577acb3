"""Hugging Face folders become checkpoints that runs can begin with, and come back from them bit for bit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained_runs import REPOSITORY, RUN, Trained

from crystal_hpc.config.load import load_run
from crystal_hpc.convert import formats, from_hf, names, weights
from crystal_hpc.convert.hf_folder import HfFolder
from crystal_hpc.convert.readback import check_export, check_import
from crystal_hpc.convert.reader import CheckpointReader, run_of
from crystal_hpc.errors import CheckpointError, CrystalError
from crystal_hpc.train.generations import find_damage
from crystal_hpc.train.manifest import read_manifest

LLAMA = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 40, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
STABLELM = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 40, "tie_word_embeddings": False, "use_qkv_bias": False,
    "partial_rotary_factor": 0.5, "rope_scaling": None,
}  # fmt: skip
CRYSTAL = {
    "vocab_size": 120, "n_embd": 32, "n_inner": 44, "n_layer": 2, "n_head": 4, "n_positions": 40, "rotary_dim": 4,
    "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22, "mup_width_scale": 0.0625,
}  # fmt: skip


def randomized(model: Any, dtype: torch.dtype) -> Any:
    """No bias zero, no norm one."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter == 1))
    return model.to(dtype)


def save_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    randomized(LlamaForCausalLM(LlamaConfig(**LLAMA)), torch.float32).save_pretrained(folder, max_shard_size="40KB")


def save_stablelm(folder: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    randomized(StableLmForCausalLM(StableLmConfig(**STABLELM)), torch.bfloat16).save_pretrained(folder)


def save_crystal(folder: Path) -> None:
    """As the original release: torch files with an index, the head as a copy, the mask of GPT-2's code."""
    from crystal_hpc.convert.hf.configuration_crystalcoder import CrystalCoderConfig
    from crystal_hpc.convert.hf.modeling_crystalcoder import CrystalCoderForCausalLM

    model = randomized(CrystalCoderForCausalLM(CrystalCoderConfig(**CRYSTAL)), torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8)
    folder.mkdir()
    placed = {}
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        torch.save(part, folder / f"pytorch_model-0000{number}-of-00003.bin")
        placed |= dict.fromkeys(part, f"pytorch_model-0000{number}-of-00003.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    config = {**CRYSTAL, "model_type": "crystalcoder", "architectures": ["CrystalCoderLMHeadModel"]}
    config |= {"activation_function": "swiglu", "position_embedding_type": "rotary", "mup_scale_qk_dot_by_d": True}
    (folder / "config.json").write_text(json.dumps(config))


SAVED: dict[str, Callable[[Path], None]] = {
    "llama": save_llama,
    "stablelm": save_stablelm,
    "crystalcoder": save_crystal,
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sources / <format>`: a folder that Transformers wrote."""
    folder = tmp_path_factory.mktemp("sources")
    for name, save in SAVED.items():
        save(folder / name)
    return folder


@pytest.fixture(scope="session")
def verified(sources: Path) -> dict[str, Any]:
    """What a process saw that imported each of them with every check."""
    worker = [sys.executable, str(Path(__file__).with_name("conversion_worker.py")), str(sources), *SAVED]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    subprocess.run(worker, env=environment, check=True, timeout=180)
    seen: dict[str, Any] = json.loads((sources / "verified.json").read_text())
    return seen


def tensors_of(folder: Path) -> dict[str, Tensor]:
    hf = HfFolder(folder)
    return {name: hf.read(name) for name in hf.tensors}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def bring_in(folder: Path, out: Path, run: Any = None, **options: Any) -> from_hf.ImportSummary:
    with from_hf.opened(folder, run) as source:
        return from_hf.convert(source, out, **options)


@pytest.mark.parametrize("kind", SAVED)
def test_both_models_compute_the_same_logits(kind: str, verified: dict[str, Any]) -> None:
    assert "error" not in verified[kind]
    assert "tensors and 80 tokens: logits as large as" in verified[kind]["said"]


@pytest.mark.parametrize("kind", SAVED)
def test_megatron_itself_loads_what_was_written(kind: str, verified: dict[str, Any]) -> None:
    assert verified[kind]["megatron"] == pytest.approx(verified[kind]["ours"], rel=1e-6)
    assert len(verified[kind]["ours"]) > 15


@pytest.mark.parametrize("shard_bytes", [30_000, 10**9])
@pytest.mark.parametrize("kind", SAVED)
def test_there_and_back_is_bit_equal_and_both_ways_read_back(
    kind: str, shard_bytes: int, sources: Path, tmp_path: Path
) -> None:
    target = formats.by_name(kind)
    bring_in(sources / kind, tmp_path / "weights", shard_bytes=shard_bytes)
    run = run_of(tmp_path / "weights")
    dtype = weights.trained_dtype(run)
    weights.export(tmp_path / "weights", run, None, tmp_path / "back", dtype, shard_bytes, target=target)
    shape = names.Shape(run.model, run.mup)
    source = tensors_of(sources / kind)
    kept = {
        name: tensor
        for name, tensor in source.items()
        if name not in target.copies(shape) and not target.is_buffer(name)
    }
    assert same(tensors_of(tmp_path / "back"), kept)
    with from_hf.opened(sources / kind) as opened:
        assert check_import(tmp_path / "weights", opened) == len(kept)
    assert check_export(tmp_path / "back", run, target) == len(CheckpointReader(tmp_path / "weights", run).names())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [target.architecture]


@pytest.mark.parametrize("layout", ["plain", "tensor", "pipeline", "bf16"])
def test_a_trained_checkpoint_comes_back_from_its_export_bit_for_bit(
    layout: str, trained: Trained, tmp_path: Path
) -> None:
    run = trained.run(*(["precision=bf16"] if layout == "bf16" else []))
    weights.export(trained.checkpoint(layout), run, None, tmp_path / "out", weights.trained_dtype(run))
    bring_in(tmp_path / "out", tmp_path / "weights", run)
    before, after = CheckpointReader(trained.checkpoint(layout), run), CheckpointReader(tmp_path / "weights", run)
    assert set(before.names()) == set(after.names())
    for name in before.names():
        tensor = before.read(name)
        if name.endswith("word_embeddings.weight"):
            tensor = tensor[:126]  # padded for two tensor-parallel ranks
        assert torch.equal(tensor, after.read(name)) and tensor.dtype == after.dtype(name)


def test_the_folder_is_a_generation_of_weights_that_its_digests_prove(sources: Path, tmp_path: Path) -> None:
    summary = bring_in(sources / "stablelm", tmp_path / "weights", shard_bytes=20_000)
    manifest = read_manifest(tmp_path / "weights")
    assert (manifest.kind, manifest.why, manifest.precision, manifest.optimizer) == (
        "weights",
        "converted",
        "bf16",
        None,
    )
    on_disk = {path.name for path in (tmp_path / "weights").iterdir()}
    assert on_disk == {*manifest.files, "manifest.json"} and "__0_2.distcp" in on_disk
    assert find_damage(tmp_path / "weights", manifest) == []
    elements = {name: torch.Size(tensor.shape).numel() for name, tensor in manifest.tensors.items()}
    assert sum(elements.values()) == summary.parameters == summary.weight_bytes // 2
    norm = manifest.tensors["decoder.layers.1.mlp.linear_fc2.weight"].norm
    published = tensors_of(sources / "stablelm")["model.layers.1.mlp.down_proj.weight"]
    assert norm == pytest.approx(float(published.double().norm()), rel=1e-6)


@pytest.mark.parametrize("kind", SAVED)
def test_the_sections_beside_the_weights_make_a_config_that_they_fit(kind: str, sources: Path, tmp_path: Path) -> None:
    bring_in(sources / kind, tmp_path / "weights")
    text = (tmp_path / "weights" / "model.yaml").read_text()
    assert f"from {kind}" in text and "sequences of at most 40 tokens" in text
    config = {key: value for key, value in yaml.safe_load(RUN).items() if key not in ("model", "mup")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config) + text)
    run = load_run(tmp_path / "run.yaml")
    bring_in(sources / kind, tmp_path / "again", run)
    assert run_of(tmp_path / "again").model == run.model
    CheckpointReader(tmp_path / "again", run)


def test_a_run_that_the_weights_do_not_fit_is_told_field_by_field(sources: Path, tmp_path: Path) -> None:
    run = load_run(written(tmp_path / "run.yaml", RUN), ["model.layers=3", "model.init_std=0.5"])
    with pytest.raises(CheckpointError) as caught:
        bring_in(sources / "crystalcoder", tmp_path / "weights", run)
    said = str(caught.value)
    for field in ("model.layers = 3, not 2", "model.ffn = 42, not 44", "mup.base_hidden = 16, not 2"):
        assert field in said
    assert "init_std" not in said and "model.heads" not in said and "\n" not in said
    with pytest.raises(CheckpointError, match=r"mup\.base_hidden = 16, and they have none"):
        bring_in(sources / "llama", tmp_path / "weights", run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_weights_are_rounded_on_request_and_otherwise_stay_as_they_are(sources: Path, tmp_path: Path) -> None:
    assert bring_in(sources / "llama", tmp_path / "same").dtype == "float32"
    assert bring_in(sources / "llama", tmp_path / "rounded", dtype="bfloat16").dtype == "bfloat16"
    assert read_manifest(tmp_path / "rounded").precision == "bf16"
    same, rounded = (CheckpointReader(tmp_path / name, run_of(tmp_path / name)) for name in ("same", "rounded"))
    for name in same.names():
        assert torch.equal(same.read(name).bfloat16(), rounded.read(name))
    with from_hf.opened(sources / "llama") as source:
        assert check_import(tmp_path / "rounded", source) == len(source.folder.tensors)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder of one safetensors file, which a test may spoil."""
    folder = tmp_path / "hf"
    weights_ = {name: tensor for name, tensor in tensors_of_crystal().items()}
    folder.mkdir()
    config = {**CRYSTAL, "model_type": "crystalcoder", "activation_function": "swiglu"}
    config |= {"position_embedding_type": "rotary"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights_, folder / "model.safetensors")
    return folder


def tensors_of_crystal() -> dict[str, Tensor]:
    from crystal_hpc.convert.hf.configuration_crystalcoder import CrystalCoderConfig
    from crystal_hpc.convert.hf.modeling_crystalcoder import CrystalCoderForCausalLM

    model = randomized(CrystalCoderForCausalLM(CrystalCoderConfig(**CRYSTAL)), torch.float32)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


WTE, FC, LN = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.ln_1.bias"


def spoil(tensors: dict[str, Tensor], config: dict[str, Any], how: str) -> None:
    match how:
        case "a tensor is missing":
            del tensors[FC]
        case "a tensor is left over":
            tensors["transformer.wpe.weight"] = torch.ones(3)
        case "a tensor has another shape":
            tensors[FC] = tensors[FC].T.contiguous()
        case "the head is no copy":
            tensors["lm_head.weight"] = tensors[WTE] + 1
        case "whole numbers":
            tensors[LN] = tensors[LN].to(torch.int8)
        case "too fine":
            tensors[LN] = tensors[LN].double()
        case "mixed in a stack":
            tensors[LN] = tensors[LN].bfloat16()
        case "mixed in a tensor":
            tensors[FC] = tensors[FC].bfloat16()
        case "no number":
            tensors[FC][3, 4] = torch.nan
        case "infinite":
            tensors[FC][3, 4] = torch.inf
        case "another kind":
            config["model_type"] = "mamba"
        case "another function":
            config["activation_function"] = "gelu"
        case "more layers":
            config["n_layer"] = 3


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a tensor is missing", f"hf: lacks {FC}, which a model of this config has"),
        ("a tensor is left over", "hf: holds transformer.wpe.weight, for which a model of this config has no place"),
        ("a tensor has another shape", f"{FC}: is 44x32, and a model of this config has 32x44"),
        ("the head is no copy", "lm_head.weight: differs from transformer.wte.weight"),
        ("whole numbers", f"{LN}: is of int8, which is no number format of weights"),
        ("too fine", f"{LN}: is of float64, which is no number format of weights"),
        ("mixed in a stack", "choose one for all with --dtype"),
        ("mixed in a tensor", "choose one for all with --dtype"),
        ("no number", "decoder.layers.1.mlp.linear_fc1.weight would hold numbers that are infinite or none at all"),
        ("infinite", "decoder.layers.1.mlp.linear_fc1.weight would hold numbers that are infinite or none at all"),
        ("another kind", "model_type: 'mamba' is no format that can be read"),
        ("another function", "activation_function: 'gelu'"),
        ("more layers", "hf: lacks transformer.h.2."),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line_and_nothing_is_left(
    how: str, said: str, copied: Path, tmp_path: Path
) -> None:
    tensors, config = load_file(copied / "model.safetensors"), json.loads((copied / "config.json").read_text())
    spoil(tensors, config, how)
    save_file(tensors, copied / "model.safetensors")
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        bring_in(copied, tmp_path / "weights")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_changes_while_it_is_read_is_refused(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = HfFolder.read_hashed

    def read(hf: HfFolder, name: str, into: Tensor | None = None) -> tuple[Tensor, str]:
        path = copied / hf.tensors[name].file
        path.write_bytes(path.read_bytes())  # in place: who has it open sees other weights
        return reading(hf, name, into)

    monkeypatch.setattr(HfFolder, "read_hashed", read)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        bring_in(copied, tmp_path / "weights")
    assert not list(tmp_path.glob("weights*"))


def test_mixed_formats_become_one_on_request(copied: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors[LN] = tensors[LN].double()
    tensors[FC] = tensors[FC].half()
    save_file(tensors, copied / "model.safetensors")
    assert bring_in(copied, tmp_path / "weights", dtype="float32").dtype == "float32"


def test_an_import_is_replaced_only_on_request_and_anything_else_never(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    bring_in(sources / "llama", out)
    with pytest.raises(CheckpointError, match="holds an import already"):
        bring_in(sources / "llama", out)
    bring_in(sources / "stablelm", out, overwrite=True)
    assert read_manifest(out).precision == "bf16"
    (out / "import.json").unlink()
    with pytest.raises(CheckpointError, match="exists and is no import"):
        bring_in(sources / "llama", out, overwrite=True)


@pytest.mark.parametrize("spoiled", ["back/model.safetensors", "weights/__0_0.distcp"])
def test_what_a_disk_spoiled_afterwards_is_found_by_reading_back(spoiled: str, copied: Path, tmp_path: Path) -> None:
    bring_in(copied, tmp_path / "weights")
    run = run_of(tmp_path / "weights")
    weights.export(tmp_path / "weights", run, None, tmp_path / "back")
    path = tmp_path / spoiled
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CrystalError, match=path.name), from_hf.opened(copied) as source:
        if spoiled.startswith("back"):
            check_export(tmp_path / "back", run, weights.FORMAT)
        else:
            check_import(tmp_path / "weights", source)
    with pytest.raises(CrystalError, match=path.name):  # nor can it be converted
        if spoiled.startswith("back"):
            bring_in(tmp_path / "back", tmp_path / "more")
        else:
            weights.export(tmp_path / "weights", run, None, tmp_path / "more")
    assert not (tmp_path / "more").exists()
