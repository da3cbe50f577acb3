"""Llama's and StableLM's formats against Transformers itself; every table there and back; models that are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import megatron_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Model, Mup, Run
from crystal_hpc.convert import formats, names
from crystal_hpc.convert.formats import folding
from crystal_hpc.convert.names import Shape
from crystal_hpc.errors import CheckpointError

REPOSITORY = Path(__file__).parents[2]
LLAMA, STABLELM, CRYSTALCODER = (formats.by_name(name) for name in ("llama", "stablelm", "crystalcoder"))

# Heads of 16 dimensions, whose square root is a power of two.
SIZES = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 42, "vocab_size": 61, "bias": False}
LLAMA_LIKE = {**SIZES, "norm": "rmsnorm", "rotary_fraction": 1.0}
STABLELM_LIKE = {**SIZES, "norm": "layernorm", "rotary_fraction": 0.5}
# The embedding times 8, the logits times 2 x 16/64, queries times 1/4.
MUP = {"base_hidden": 16, "embedding_multiplier": 8.0, "output_multiplier": 2.0}
# Four layers' worth of float32 sums of up to 64 terms; a tensor in the wrong place changes logits by about their size.
TOLERANCE = 1e-5

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("llama", {**LLAMA_LIKE, "tied_embeddings": False, "rotary_base": 500000}, None),
    "llama-halves": ("llama", {**LLAMA_LIKE, "rotary_interleaved": False}, None),
    "llama-mup": ("llama", LLAMA_LIKE, MUP),
    "llama-mup-one-table": ("llama", LLAMA_LIKE, {**MUP, "embedding_multiplier": 0.5}),
    "stablelm": ("stablelm", {**STABLELM_LIKE, "norm_epsilon": 1e-3}, None),
    "stablelm-halves": (
        "stablelm",
        {**STABLELM_LIKE, "rotary_interleaved": False, "tied_embeddings": False, "rotary_fraction": 0.25},
        None,
    ),
    "stablelm-mup": ("stablelm", STABLELM_LIKE, MUP),
    "stablelm-mup-untied": ("stablelm", {**STABLELM_LIKE, "tied_embeddings": False}, MUP),
}


def write_run(path: Path, model: dict[str, Any], mup: dict[str, Any] | None) -> Run:
    rate = {"peak": 0.01}
    phase = {"name": "words", "sequence_length": 48, "batch_size": 1, "steps": 1, "mixture": {"prose": 1.0}}
    content = {
        "name": "tiny",
        "precision": "fp32",
        "model": model,
        "mup": mup,
        "data": {"tokenizer": "tokenizer", "sources": {"prose": "prose"}},
        "phases": [{**phase, "learning_rate": rate}],
    }
    path.write_text(yaml.safe_dump(content))
    return load_run(path)


def foreign_models() -> dict[str, Any]:
    """What Transformers makes from its own configs, with random weights."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 42,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 48,
        "initializer_range": 0.15,
    }
    torch.manual_seed(5)
    return {
        "from-llama": LlamaForCausalLM(LlamaConfig(**sizes, rope_theta=40000.0)),
        "from-llama-tied": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
        "from-stablelm": StableLmForCausalLM(StableLmConfig(**sizes, partial_rotary_factor=0.5)),
        "from-stablelm-tied": StableLmForCausalLM(StableLmConfig(**sizes, tie_word_embeddings=True)),
    }


FOREIGN = ("from-llama", "from-llama-tied", "from-stablelm", "from-stablelm-tied")


class Computed:
    """`runs`, the weights by Megatron's names, and the Megatron model's logits on `rows`, by case."""

    def __init__(self, folder: Path) -> None:
        self.rows = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(2))
        save_file({"rows": self.rows}, folder / "rows")
        self.foreign = {name: model.eval() for name, model in foreign_models().items()}
        self.runs: dict[str, Run] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for name, (_, model, mup) in CASES.items():
            self.runs[name] = write_run(folder / f"{name}.yaml", model, mup)
            self.tensors[name] = megatron_tensors(self.runs[name].model)
        for name, foreign in self.foreign.items():
            config = foreign.config.to_dict()
            source = formats.of_config(config)
            shape, _ = source.read_config(config)
            self.runs[name] = write_run(folder / f"{name}.yaml", shape.model.model_dump(), None)
            self.tensors[name] = names.to_megatron(source, shape, foreign.state_dict())
        for name, tensors in self.tensors.items():
            save_file(tensors, folder / f"{name}.safetensors")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
        worker = [sys.executable, str(Path(__file__).with_name("formats_worker.py")), str(folder)]
        subprocess.run(worker, env=environment, check=True, timeout=180)
        self.logits = load_file(folder / "logits")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    return Computed(tmp_path_factory.mktemp("formats"))


@torch.no_grad()
def assert_same_logits(model: Any, computed: Computed, case: str) -> None:
    expected = computed.logits[case]
    logits = model(computed.rows).logits
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_from_an_export_what_megatron_computes(
    case: str, computed: Computed, tmp_path: Path
) -> None:
    target, run = formats.by_name(CASES[case][0]), computed.runs[case]
    shape = Shape(run.model, run.mup)
    config = {"architectures": [target.architecture], "torch_dtype": "float32", **target.published_config(run)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    published = names.to_published(target, shape, computed.tensors[case])
    save_file({name: tensor.contiguous() for name, tensor in published.items()}, tmp_path / "model.safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == target.architecture
    assert_same_logits(model.eval(), computed, case)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == ("lm_head.weight" not in published)
    assert_equal(names.to_megatron(target, shape, model.state_dict()), computed.tensors[case])


@pytest.mark.parametrize("case", FOREIGN)
def test_megatron_computes_from_an_import_what_transformers_computes(case: str, computed: Computed) -> None:
    assert_same_logits(computed.foreign[case], computed, case)


@pytest.mark.parametrize("case", FOREIGN)
def test_transformers_own_models_come_back_bit_by_bit(case: str, computed: Computed) -> None:
    model = computed.foreign[case]
    config = model.config.to_dict()
    source = formats.of_config(config)
    shape, longest = source.read_config(config)
    assert (longest, shape.mup) == (48, None)
    published = names.to_published(source, shape, computed.tensors[case])
    copies = source.copies(shape)
    assert bool(copies) == case.endswith("tied")
    assert_equal(published, {name: tensor for name, tensor in model.state_dict().items() if name not in copies})


@pytest.mark.parametrize("case", CASES)
def test_what_config_json_says_is_what_transformers_and_we_read(case: str, computed: Computed, tmp_path: Path) -> None:
    target, run = formats.by_name(CASES[case][0]), computed.runs[case]
    config = target.published_config(run)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    rotary = read.rope_parameters
    assert (rotary["rope_theta"], rotary["rope_type"]) == (run.model.rotary_base, "default")
    assert rotary.get("partial_rotary_factor", 1.0) == run.model.rotary_fraction
    # From the multipliers on, the weights hold them, and pairs stand as the format has them.
    split_in_two = folding.has_two_ends(Shape(run.model, run.mup))
    tied = run.model.tied_embeddings and not split_in_two
    expected = run.model.model_copy(update={"rotary_interleaved": False, "tied_embeddings": tied})
    assert target.read_config(config) == (Shape(expected), 48)
    read.save_pretrained(tmp_path)
    assert target.read_config(json.loads((tmp_path / "config.json").read_text())) == (Shape(expected), 48)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert names.same_bits(found[name], tensor), name


@st.composite
def shapes(draw: st.DrawFn, name: str) -> Shape:
    """Any small model that a format can express."""
    width, heads = draw(st.sampled_from([4, 16])), draw(st.integers(1, 3))
    rotated = width if name == "llama" else 2 * draw(st.integers(1, width // 2))
    model: dict[str, Any] = {
        "layers": draw(st.integers(1, 3)),
        "hidden": width * heads,
        "heads": heads,
        "ffn": draw(st.integers(1, 9)),
        "vocab_size": draw(st.integers(1, 20)),
        "norm": "rmsnorm" if name == "llama" else "layernorm",
        "bias": name == "crystalcoder",
        "rotary_fraction": rotated / width,
        "rotary_interleaved": name == "crystalcoder" or draw(st.booleans()),
        "tied_embeddings": name == "crystalcoder" or draw(st.booleans()),
    }
    # Any multiplier fits CrystalCoder; into weights go powers of two, and hidden / base_hidden is made one.
    multiplier = st.floats(0.1, 20) if name == "crystalcoder" else st.integers(-4, 4).map(lambda power: 2.0**power)
    mup = Mup(
        base_hidden=width * heads * 2 ** draw(st.integers(0, 2)),
        embedding_multiplier=draw(multiplier),
        output_multiplier=draw(multiplier),
        scale_attention_by_head=draw(st.booleans()),
    )
    return Shape(Model(**model), draw(st.sampled_from([None, mup])))


@pytest.mark.parametrize("name", formats.FORMATS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_table_is_total_and_reversible(name: str, data: st.DataObject) -> None:
    target = formats.by_name(name)
    shape = data.draw(shapes(name))
    assert name in formats.fitting(shape)
    tensors = megatron_tensors(shape.model)
    entries = target.entries(shape)
    assert sorted(entry.megatron for entry in entries) == sorted(tensors)
    assert {key: names.size(shape.model, key) for key in tensors} == {k: tuple(t.shape) for k, t in tensors.items()}
    published = names.to_published(target, shape, tensors)
    assert len(published) == sum(len(entry.published) for entry in entries)
    sizes = [size for entry in entries for size in names.published_sizes(entry, shape)]
    assert sizes == [tuple(tensor.shape) for tensor in published.values()]
    back = names.to_megatron(target, shape, published)
    assert_equal(back, tensors)
    assert_equal(names.to_published(target, shape, back), published)
    for lost in (min(tensors), max(tensors)):
        with pytest.raises(CheckpointError, match=f"lacks {lost}"):
            names.to_published(target, shape, {key: tensor for key, tensor in tensors.items() if key != lost})
    for lost in (min(published), max(published)):
        with pytest.raises(CheckpointError, match=f"lacks {lost}"):
            names.to_megatron(target, shape, {key: tensor for key, tensor in published.items() if key != lost})
    with pytest.raises(CheckpointError, match=r"holds model\.surprise"):
        names.to_megatron(target, shape, {**published, "model.surprise": torch.zeros(1)})


def shape_of(kind: dict[str, Any], mup: dict[str, Any] | None = None, **changes: Any) -> Shape:
    return Shape(Model(**{**kind, **changes}), Mup(**mup) if mup else None)


@pytest.mark.parametrize(
    ("name", "shape", "said", "fits"),
    [
        (
            "llama",
            shape_of(LLAMA_LIKE, norm="layernorm"),
            ["model.norm: the Llama format can only express rms"],
            ["stablelm"],
        ),
        ("llama", shape_of(LLAMA_LIKE, bias=True), ["model.bias"], []),
        ("llama", shape_of(LLAMA_LIKE, rotary_fraction=0.5), ["model.rotary_fraction"], []),
        ("llama", shape_of(STABLELM_LIKE), ["model.norm", "model.rotary_fraction"], ["stablelm"]),
        ("stablelm", shape_of(LLAMA_LIKE), ["model.norm: the StableLM format can only express layernorm"], ["llama"]),
        ("stablelm", shape_of(STABLELM_LIKE, bias=True), ["model.bias: "], ["crystalcoder"]),
        ("crystalcoder", shape_of(LLAMA_LIKE), ["model.norm: the CrystalCoder format", "model.bias"], ["llama"]),
        (
            "stablelm",
            shape_of(STABLELM_LIKE, {**MUP, "embedding_multiplier": 14.6}),
            [
                "mup.embedding_multiplier: 14.6 is no power of two and cannot go into the weights exactly "
                "(crystalcoder's config has a field for it)"
            ],
            [],
        ),
        (
            "llama",
            shape_of(LLAMA_LIKE, {**MUP, "output_multiplier": 2.22}),
            ["mup.output_multiplier: 2.22 x base_hidden / hidden = 0.555 is no power of two"],
            [],
        ),
        (
            "llama",
            shape_of(LLAMA_LIKE, {**MUP, "base_hidden": 48}),
            ["mup.output_multiplier: 2 x base_hidden / hidden = 1.5 is no power of two"],
            [],
        ),
        (
            "stablelm",
            shape_of({**STABLELM_LIKE, "heads": 8}, MUP),
            ["mup.scale_attention_by_head: the square root of a head's 8 dimensions is no power of two"],
            [],
        ),
    ],
)
def test_a_model_that_a_format_cannot_express_is_refused_with_each_reason(
    name: str, shape: Shape, said: list[str], fits: list[str]
) -> None:
    target = formats.by_name(name)
    tensors = megatron_tensors(shape.model)
    for convert in (names.to_published, names.to_megatron):
        with pytest.raises(CheckpointError) as caught:
            convert(target, shape, tensors)
        assert all(reason in str(caught.value) for reason in said)
        assert "\n" not in str(caught.value)
    assert len(target.reasons_against(shape)) == len(said)
    assert formats.fitting(shape) == fits


def test_the_two_ends_of_a_tied_table_must_agree_but_for_their_factors() -> None:
    shape = shape_of(LLAMA_LIKE, MUP)
    tensors = megatron_tensors(shape.model)
    published = names.to_published(LLAMA, shape, tensors)
    table = tensors["embedding.word_embeddings.weight"]
    assert torch.equal(published["model.embed_tokens.weight"], 8 * table)
    assert torch.equal(published["lm_head.weight"], table / 2)
    # Read without the original multipliers, it is a model with a head of its own.
    untied = names.to_megatron(LLAMA, shape_of(LLAMA_LIKE, tied_embeddings=False), published)
    assert torch.equal(untied["output_layer.weight"], table / 2)
    published["lm_head.weight"][3, 5] *= 1.0001
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight and lm_head\.weight: differ by more than muP"):
        names.to_megatron(LLAMA, shape, published)


@pytest.mark.parametrize(
    ("tensor", "number", "mup"),
    [
        ("embedding.word_embeddings.weight", 1e38, {**MUP, "embedding_multiplier": 8.0}),
        ("embedding.word_embeddings.weight", 3e-45, {**MUP, "embedding_multiplier": 0.25}),
        ("output_layer.weight", 1e-44, MUP),
        ("decoder.layers.1.self_attention.linear_qkv.weight", 3e-45, MUP),
    ],
)
def test_a_number_that_a_factor_would_change_is_refused_by_its_tensors_name(
    tensor: str, number: float, mup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "AT_ONCE", 2)  # rows in turn
    shape = shape_of(LLAMA_LIKE, mup, tied_embeddings=False, rotary_interleaved=False)
    tensors = megatron_tensors(shape.model)
    tensors[tensor][1, 2] = number
    with pytest.raises(CheckpointError, match=f"{tensor}: has numbers so small or so large that muP's factor of"):
        names.to_published(LLAMA, shape, tensors)


def test_numbers_at_the_ends_of_the_format_that_survive_their_factor_are_no_error() -> None:
    shape = shape_of(LLAMA_LIKE, {**MUP, "embedding_multiplier": 8.0, "output_multiplier": 4.0})
    tensors = megatron_tensors(shape.model)
    tensors["embedding.word_embeddings.weight"][0, :4] = torch.tensor([1e-44, -0.0, float("inf"), -3e37])
    assert_equal(names.to_megatron(LLAMA, shape, names.to_published(LLAMA, shape, tensors)), tensors)


@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_bfloat16_weights_stay_bfloat16_and_come_back(name: str) -> None:
    shape = shape_of({"llama": LLAMA_LIKE, "stablelm": STABLELM_LIKE}[name], MUP)
    tensors = {key: tensor.bfloat16() for key, tensor in megatron_tensors(shape.model).items()}
    published = names.to_published(formats.by_name(name), shape, tensors)
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert_equal(names.to_megatron(formats.by_name(name), shape, published), tensors)


def test_saved_frequencies_are_passed_over() -> None:
    shape = shape_of(LLAMA_LIKE)
    tensors = megatron_tensors(shape.model)
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    assert_equal(names.to_megatron(LLAMA, shape, names.to_published(LLAMA, shape, tensors) | old), tensors)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes("crystalcoder"))
def test_a_crystalcoder_config_says_all_of_the_model(shape: Shape) -> None:
    run = load_run(REPOSITORY / "configs/crystal-demo.yaml").model_copy(update={"model": shape.model, "mup": shape.mup})
    read, longest = CRYSTALCODER.read_config(json.loads(json.dumps(CRYSTALCODER.published_config(run))))
    same = shape.mup == Mup(base_hidden=shape.model.hidden, scale_attention_by_head=False)
    assert read == Shape(shape.model, None if same else shape.mup)
    assert longest == max(phase.sequence_length for phase in run.phases)


def test_an_unknown_format_is_refused_with_what_is_known() -> None:
    with pytest.raises(CheckpointError, match="mistral: no such format; choose from crystalcoder, llama, stablelm"):
        formats.by_name("mistral")
