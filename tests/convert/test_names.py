"""The name table is total and reversible, and loses no tensor in silence."""

import itertools

import pytest
import torch
from made_up import megatron_tensors

from crystal_hpc.config.schema import Model
from crystal_hpc.convert import names
from crystal_hpc.convert.formats.crystalcoder import CRYSTALCODER
from crystal_hpc.errors import CheckpointError

MODEL = Model(layers=3, hidden=24, heads=3, ffn=10, vocab_size=31)
SHAPE = names.Shape(MODEL)
TENSORS_PER_LAYER = 12
PUBLISHED_PER_LAYER = 14  # the gate has a tensor of its own, for weight and bias


def test_every_tensor_has_one_place_on_each_side() -> None:
    entries = CRYSTALCODER.entries(SHAPE)
    ours = [entry.megatron for entry in entries]
    theirs = list(itertools.chain.from_iterable(entry.published for entry in entries))
    assert len(set(ours)) == len(ours) == 3 + TENSORS_PER_LAYER * MODEL.layers
    assert len(set(theirs)) == len(theirs) == 3 + PUBLISHED_PER_LAYER * MODEL.layers
    assert {name: names.size(MODEL, name) for name in ours} == {
        name: tuple(tensor.shape) for name, tensor in megatron_tensors(MODEL).items()
    }


def test_going_there_and_back_changes_no_bit() -> None:
    tensors = megatron_tensors(MODEL)
    published = names.to_published(CRYSTALCODER, SHAPE, tensors)
    back = names.to_megatron(CRYSTALCODER, SHAPE, published)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    again = names.to_published(CRYSTALCODER, SHAPE, back)
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())


def test_query_key_and_value_of_each_head_land_in_their_thirds() -> None:
    tensors = megatron_tensors(MODEL)
    fused = tensors["decoder.layers.1.self_attention.linear_qkv.weight"]
    published = names.to_published(CRYSTALCODER, SHAPE, tensors)["transformer.h.1.attn.c_attn.weight"]
    h, d = MODEL.hidden, MODEL.hidden // MODEL.heads
    assert published.shape == (h, 3 * h)
    for head, kind in itertools.product(range(MODEL.heads), range(3)):
        rows = fused[(3 * head + kind) * d : (3 * head + kind + 1) * d]
        assert torch.equal(published[:, kind * h + head * d : kind * h + (head + 1) * d], rows.T)


def test_the_half_that_megatron_activates_becomes_the_gate() -> None:
    tensors = megatron_tensors(MODEL)
    published = names.to_published(CRYSTALCODER, SHAPE, tensors)
    for kind in ("weight", "bias"):
        gate, value = tensors[f"decoder.layers.0.mlp.linear_fc1.{kind}"].chunk(2)
        assert torch.equal(published[f"transformer.h.0.mlp.c_fc2.{kind}"], gate.T if kind == "weight" else gate)
        assert torch.equal(published[f"transformer.h.0.mlp.c_fc.{kind}"], value.T if kind == "weight" else value)


def test_rows_that_pad_the_vocabulary_are_dropped() -> None:
    tensors = megatron_tensors(MODEL)
    rows = tensors["embedding.word_embeddings.weight"]
    padded = tensors | {"embedding.word_embeddings.weight": torch.cat([rows, torch.zeros(3, MODEL.hidden)])}
    assert torch.equal(names.to_published(CRYSTALCODER, SHAPE, padded)["transformer.wte.weight"], rows)


def test_a_left_over_or_missing_tensor_is_named_on_either_side() -> None:
    tensors = megatron_tensors(MODEL)
    published = names.to_published(CRYSTALCODER, SHAPE, tensors)
    with pytest.raises(CheckpointError, match=r"holds decoder\.layers\.3\.extra"):
        names.to_published(CRYSTALCODER, SHAPE, tensors | {"decoder.layers.3.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"holds transformer\.h\.0\.attn\.extra"):
        names.to_megatron(CRYSTALCODER, SHAPE, published | {"transformer.h.0.attn.extra": torch.zeros(1)})
    del tensors["decoder.final_layernorm.bias"], published["transformer.h.2.mlp.c_fc2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks decoder\.final_layernorm\.bias"):
        names.to_published(CRYSTALCODER, SHAPE, tensors)
    with pytest.raises(CheckpointError, match=r"lacks transformer\.h\.2\.mlp\.c_fc2\.bias"):
        names.to_megatron(CRYSTALCODER, SHAPE, published)


def test_a_tensor_of_another_shape_is_named_on_either_side() -> None:
    tensors = megatron_tensors(MODEL)
    published = names.to_published(CRYSTALCODER, SHAPE, tensors)
    name, published_name = "decoder.layers.1.mlp.linear_fc1.weight", "transformer.h.1.mlp.c_fc2.weight"
    with pytest.raises(CheckpointError, match=rf"{name}: is 10x24, and a model of this config has 20x24"):
        names.to_published(CRYSTALCODER, SHAPE, tensors | {name: tensors[name][:10]})
    with pytest.raises(CheckpointError, match=rf"{published_name}: is 10x24, and a model of this config has 24x10"):
        names.to_megatron(CRYSTALCODER, SHAPE, published | {published_name: published[published_name].T})
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight: is 34x24, .* has 31x24"):
        names.to_megatron(CRYSTALCODER, SHAPE, published | {"transformer.wte.weight": torch.zeros(34, 24)})


def test_a_tied_head_and_saved_masks_are_accepted_but_a_different_head_is_not() -> None:
    published = names.to_published(CRYSTALCODER, SHAPE, megatron_tensors(MODEL))
    head = published["transformer.wte.weight"]
    extra = {"lm_head.weight": head, "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    assert names.to_megatron(CRYSTALCODER, SHAPE, published | extra).keys() == megatron_tensors(MODEL).keys()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs"):
        names.to_megatron(CRYSTALCODER, SHAPE, published | {"lm_head.weight": head + 1})
