"""Which Megatron tensor is which tensor of a published format: the machinery; the tables, as data, are in `formats`.

An export walks a table from left to right, an import from right to left. Every tensor of the model stands in exactly
one entry, so that a tensor that is left over, on either side, is an error and never a silent loss. An entry's rule says
which numbers of the one side are which of the other, once for both directions, so that going there and back changes no
bit; where numbers are scaled on the way, that is checked for each of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crystal_hpc.config.schema import Model, Mup, Run
from crystal_hpc.convert.blocks import copy
from crystal_hpc.errors import CheckpointError

Size = tuple[int, ...]
AT_ONCE = 2**22  # numbers that are scaled, and compared, in one go

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Megatron's tensors with a row for each token id."""


@dataclass(frozen=True)
class Shape:
    """What of a run a conversion depends on."""

    model: Model
    mup: Mup | None = None

    @property
    def head_width(self) -> int:
        """Dimensions of one attention head."""
        return self.model.hidden // self.model.heads

    @property
    def rotated(self) -> int:
        """Dimensions of each head, counted from its first, that rotary positions turn."""
        return int(self.head_width * self.model.rotary_fraction)


class Piece(NamedTuple):
    """Some numbers of a Megatron tensor, and the same of a published one: two views of one shape."""

    megatron: Tensor
    published: Tensor
    factor: float = 1.0
    """What a published number is of Megatron's; a power of two."""
    again: bool = False
    """Whether a piece before has the same Megatron numbers; both must then say the same."""


@dataclass(frozen=True)
class Rule:
    """How the numbers of a Megatron tensor lie in published ones, for both directions."""

    sizes: Callable[[Size, Shape], Sequence[Size]]
    """Shapes of the published tensors, from that of the Megatron tensor."""
    pieces: Callable[[Tensor, Sequence[Tensor], Shape], Iterable[Piece]]
    """The pieces that make up all of the Megatron tensor, and all of the published ones."""


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the published tensors that hold the same numbers; in a table, `{n}` is the layer."""

    megatron: str
    published: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True)
class Format:
    """A published format: where each tensor goes, and what config.json says of the model."""

    name: str
    """As options and `formats.by_name` have it."""
    title: str
    """As messages call it."""
    architecture: str
    """The class of Transformers that loads it."""
    entries: Callable[[Shape], list[Entry]]
    """The whole table of one expressible model, every layer written out, in the order of the forward pass."""
    copies: Callable[[Shape], Mapping[str, str]]
    """Published names that repeat another tensor: a reader accepts them, an export leaves them out."""
    reasons_against: Callable[[Shape], list[str]]
    """Why a model cannot be expressed, one clause for each config key; empty where it can."""
    published_config: Callable[[Run], dict[str, Any]]
    """The fields of config.json that say what the model is."""
    read_config: Callable[[Mapping[str, Any]], tuple[Shape, int]]
    """The model and its longest sequence, in tokens, from config.json's fields; raises CheckpointError that names each
    field that says something our model cannot do. An init_std that is not given is 0.02."""
    buffers: tuple[str, ...] = ()
    """Published names (regular expressions) that hold no weights; a reader passes over them."""
    code_files: tuple[str, ...] = ()
    """Model code to ship with the weights, in `convert/hf`."""

    def check(self, shape: Shape) -> None:
        """Raises CheckpointError, in one line with every reason, when this model cannot be expressed."""
        if reasons := self.reasons_against(shape):
            raise CheckpointError(f"the {self.title} format cannot express this model: {'; '.join(reasons)}")

    def is_buffer(self, name: str) -> bool:
        """Whether a published name holds no weights."""
        return any(re.fullmatch(buffer, name) for buffer in self.buffers)


KEEP = Rule(lambda size, _: [size], lambda tensor, parts, _: [Piece(tensor, parts[0])])
"""The tensor as it is."""


def limit_reasons(title: str, limits: Mapping[str, Any], shape: Shape) -> list[str]:
    """Which of a model's keys have another value than the only one that a format can express."""
    values = {key: getattr(shape.model, key) for key in limits}
    return [
        f"model.{key}: the {title} format can only express {only}, and this run has {values[key]}"
        for key, only in limits.items()
        if values[key] != only
    ]


def has(model: Model, megatron: str) -> bool:
    """Whether a model has this Megatron tensor: some have biases, a norm with a bias, a head of their own."""
    if megatron.endswith(("layer_norm_bias", "final_layernorm.bias")):
        return model.norm == "layernorm"
    if megatron == "output_layer.weight":
        return not model.tied_embeddings
    return model.bias or not megatron.endswith(".bias")


def size(model: Model, megatron: str) -> tuple[int, ...]:
    """Shape of a Megatron tensor in the whole model, by its name; the vocabulary is not padded."""
    h, f = model.hidden, model.ffn
    if megatron in VOCABULARY:
        return (model.vocab_size, h)
    linear = {"linear_qkv": (3 * h, h), "linear_proj": (h, h), "linear_fc1": (2 * f, h), "linear_fc2": (h, f)}
    owner, _, kind = megatron.rpartition(".")
    sizes = linear.get(owner.rpartition(".")[2], (h,))
    return sizes if kind == "weight" else sizes[:1] if kind == "bias" else (h,)


def expand(table: Iterable[Entry], shape: Shape) -> list[Entry]:
    """A table for one model: each layer's entries written out, those left out that the model has no tensor for."""
    entries = [entry for entry in table if has(shape.model, entry.megatron)]
    layered = [index for index, entry in enumerate(entries) if "{n}" in entry.megatron]
    first, last = layered[0], layered[-1] + 1
    blocks = [_numbered(entry, n) for n in range(shape.model.layers) for entry in entries[first:last]]
    return entries[:first] + blocks + entries[last:]


def _numbered(entry: Entry, n: int) -> Entry:
    published = tuple(name.format(n=n) for name in entry.published)
    return replace(entry, megatron=entry.megatron.format(n=n), published=published)


def split(entry: Entry, shape: Shape, tensor: Tensor, into: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
    """The published tensors of one Megatron tensor, whose vocabulary may be padded with rows that belong to no token.

    In the order of `entry.published`; contiguous. `into`: tensors to fill instead of new ones, in a dtype of theirs.
    Raises CheckpointError that names the tensor, for a wrong shape and for numbers that would not come back.
    """
    expected = size(shape.model, entry.megatron)
    if entry.megatron in VOCABULARY and tensor.ndim == 2 and len(tensor) > expected[0]:
        tensor = tensor[: expected[0]]
    _check_size(entry.megatron, tensor, expected)
    if into is None:
        into = [torch.empty(sizes, dtype=tensor.dtype) for sizes in published_sizes(entry, shape)]
    with _naming(entry.megatron):
        for piece in entry.rule.pieces(tensor, into, shape):
            _move(piece.published, piece.megatron, piece.factor)
    return into


def join(entry: Entry, shape: Shape, parts: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
    """The Megatron tensor of published ones, in the order of `entry.published`; its vocabulary is not padded.

    Contiguous. `into`: a tensor to fill instead of a new one, in a dtype of its own. Raises CheckpointError that names
    the tensor, for a wrong shape and for numbers that would not come back.
    """
    for name, part, expected in zip(entry.published, parts, published_sizes(entry, shape), strict=True):
        _check_size(name, part, expected)
    if into is None:
        into = torch.empty(size(shape.model, entry.megatron), dtype=parts[0].dtype)
    with _naming(" and ".join(entry.published)):
        for piece in entry.rule.pieces(into, parts, shape):
            if piece.again:
                _check_again(piece)
            else:
                _move(piece.megatron, piece.published, 1 / piece.factor)
    return into


def published_sizes(entry: Entry, shape: Shape) -> Sequence[Size]:
    """Shapes of an entry's published tensors."""
    return entry.rule.sizes(size(shape.model, entry.megatron), shape)


def _move(target: Tensor, source: Tensor, factor: float) -> None:
    """Fills `target` with the numbers of `source`, rounded to its dtype, times a power of two.

    Raises CheckpointError where dividing would not give the same bits back: numbers that overflow, or are subnormal.
    """
    if factor == 1.0:
        copy(target, source)
        return
    for after, before in _by_rows(target, source):
        numbers = before.to(after.dtype)
        after.copy_(numbers * factor)
        if not same_bits(after * (1 / factor), numbers):
            raise CheckpointError(
                f"has numbers so small or so large that muP's factor of {factor:g} changes them in {after.dtype}; "
                "the crystalcoder format keeps factors out of the weights"
            )


def _check_again(piece: Piece) -> None:
    for mine, theirs in _by_rows(piece.megatron, piece.published):
        if not same_bits(mine, theirs.to(mine.dtype) * (1 / piece.factor)):
            raise CheckpointError("differ by more than muP's factors, and a model with tied embeddings has one table")


def _by_rows(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time: the tensor may be the largest of the model."""
    rows = 1 + AT_ONCE // max(one[0].numel(), 1)
    return zip(torch.split(one, rows), torch.split(other, rows), strict=True)


def _check_size(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        found, right = ("x".join(map(str, sizes)) or "a number" for sizes in (tensor.shape, expected))
        raise CheckpointError(f"{name}: is {found}, and a model of this config has {right}")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the tensor's name before an error of `split` or `join`, which do not know it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def check_complete(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises CheckpointError that names what is missing from, or left over in, `found`."""
    expected, found = set(expected), set(found)
    if missing := sorted(expected - found):
        raise CheckpointError(f"{where}: lacks {_listed(missing)}, which a model of this config has")
    if left_over := sorted(found - expected):
        raise CheckpointError(f"{where}: holds {_listed(left_over)}, for which a model of this config has no place")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def to_published(target: Format, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of a model's tensors under their published names.

    Raises CheckpointError for a model that the format cannot express, for a missing or left-over tensor, and as
    `split`. `weights.export` does the same one tensor at a time, straight from the files.
    """
    target.check(shape)
    entries = target.entries(shape)
    check_complete((entry.megatron for entry in entries), tensors, "the Megatron tensors")
    return {
        name: part
        for entry in entries
        for name, part in zip(entry.published, split(entry, shape, tensors[entry.megatron]), strict=True)
    }


def to_megatron(source: Format, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of a model's tensors under their Megatron names; the vocabulary is not padded.

    Raises CheckpointError for a model that the format cannot express, for a missing or left-over tensor, for a copy
    that differs from its original, and as `join`.
    """
    source.check(shape)
    entries, copies = source.entries(shape), source.copies(shape)
    found = {name for name in tensors if not source.is_buffer(name)}
    check_complete((name for entry in entries for name in entry.published), found - set(copies), "the weights")
    for name in found & set(copies):
        if not same_bits(tensors[name], tensors[copies[name]]):
            raise CheckpointError(f"{name}: differs from {copies[name]}, but a tied model has one of them")
    return {entry.megatron: join(entry, shape, [tensors[name] for name in entry.published]) for entry in entries}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of numbers are equal bit for bit: NaN equals itself, and 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.view(bits), other.view(bits))
