"""Where two checkpoints, or two Hugging Face folders, differ: tensor by tensor, whatever layouts wrote them.

What `tools/compare_checkpoints.py` calls. Both are read box by box, at most `_BOX` bytes of each at a time, so that a
model of any size fits into little memory. A stack of layers is compared layer by layer, and each layer named.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from crystal_hpc.convert.safetensors_io import SafetensorsFile
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.distcp import METADATA, Index, Reader, Request

_BOX = 128 << 20  # bytes; small ones have a reader load stored chunks again and again
_PIECE = 1 << 22  # numbers that are compared at once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OPTIMIZER = re.compile(r"(optimizer\.state\.[^.]+\.|optimizer\.|chained_)")
_STACKED = re.compile(r"((?:optimizer\.state\.[^.]+\.)?)decoder\.layers\.(?!\d+\.)(.+)")
_LAYER = re.compile(r"(?:layers|h)\.(\d+)\.")

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Known:
    """One tensor of one side; of a stack of layers, one layer."""

    key: str
    layer: int | None
    """Its place in a stack."""
    shape: Index
    dtype: torch.dtype

    @property
    def said(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Side(Protocol):
    """What one of the two folders holds, by name."""

    tensors: dict[str, Known]

    def read(self, tensor: Known, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis; all of a tensor without axes."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Difference:
    """Two tensors of one name, shape and dtype with other numbers."""

    name: str
    tensor: Known
    count: int
    first: Index
    values: tuple[float, float]
    """At `first`, on either side."""
    largest: float
    """Absolute difference; NaN if one of the numbers is."""

    def __str__(self) -> str:
        layer = _LAYER.search(self.name)
        where = f"{self.name}{f' (layer {layer[1]})' if layer else ''}, {self.tensor.said}"
        a, b = self.values
        return (
            f"{where}: {self.count:,} of {math.prod(self.tensor.shape):,} numbers differ, the first at "
            f"{list(self.first)}: {a:.9g} and {b:.9g}; largest difference {self.largest:.6g}"
        )


@dataclass
class Comparison:
    """All that two folders do not have in common."""

    same: int = 0
    numbers: int = 0
    """Numbers in tensors that both have."""
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    """Tensors of another shape or dtype, in words."""
    differences: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not (self.only_a or self.only_b or self.unlike or self.differences)


def compare(
    a: Path, b: Path, tolerance: float = 0.0, optimizer: bool = False, on_progress: OnProgress | None = None
) -> Comparison:
    """Compares the models of two folders, with `optimizer` Adam's state and main weights, too.

    With tolerance 0, numbers are equal if their bits are. Raises CheckpointError for folders that are not two of one
    kind, or cannot be read.
    """
    if not tolerance >= 0 or math.isinf(tolerance):
        raise CheckpointError(f"a tolerance of {tolerance} makes no sense; give 0 or a small number")
    with closing(_open(a)) as one, closing(_open(b)) as other:
        return _compare_sides(a, b, one, other, tolerance, optimizer, on_progress)


def _compare_sides(
    a: Path, b: Path, one: Side, other: Side, tolerance: float, optimizer: bool, on_progress: OnProgress | None
) -> Comparison:
    if type(one) is not type(other):
        raise CheckpointError(f"{a} and {b}: a checkpoint and a Hugging Face folder; compare two of one kind")
    names = {name: None for side in (one, other) for name in side.tensors if optimizer or not _OPTIMIZER.match(name)}
    if not names:
        raise CheckpointError(f"{a} and {b}: hold no tensors of a model")
    found, done = Comparison(), 0
    total = sum(side.tensors[name].dtype.itemsize * math.prod(side.tensors[name].shape)
                for side in (one, other) for name in names if name in side.tensors)  # fmt: skip
    for name in sorted(names, key=_model_order):
        if name not in one.tensors or name not in other.tensors:
            (found.only_a if name in one.tensors else found.only_b).append(name)
            continue
        x, y = one.tensors[name], other.tensors[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            found.unlike.append(f"{name}: {x.said} and {y.said}")
            continue
        difference = _compare(name, (one, x), (other, y), tolerance)
        found.numbers += math.prod(x.shape)
        if difference:
            found.differences.append(difference)
        else:
            found.same += 1
        done += 2 * x.dtype.itemsize * math.prod(x.shape)
        if on_progress:
            on_progress("comparing", done, total)
    return found


def _model_order(name: str) -> tuple[Any, ...]:
    """As the numbers pass through a model: embedding, layers by number, the rest; the optimizer's state last."""
    state = _OPTIMIZER.match(name)
    inner = name[state.end() :] if state else name
    layer = _LAYER.search(inner)
    part = 0 if re.search(r"embed|wte", inner) else 1 if layer else 2
    return (state[0] if state else "", part, int(layer[1]) if layer else 0, inner)


def _compare(name: str, one: tuple[Side, Known], other: tuple[Side, Known], tolerance: float) -> Difference | None:
    tensor = one[1]
    count, largest, first = 0, 0.0, None
    row = math.prod(tensor.shape[1:])
    for start, stop in _boxes(tensor):
        x, y = (side.read(known, start, stop).flatten() for side, known in (one, other))
        for at in range(0, x.numel(), _PIECE):
            p, q = x[at : at + _PIECE], y[at : at + _PIECE]
            where = _unequal(p, q, tolerance)
            if not len(where):
                continue
            count += len(where)
            apart = float((p[where].double() - q[where].double()).abs().max())
            largest = apart if math.isnan(apart) else max(apart, largest)
            if first is None:
                place = int(where[0])
                first = start * row + at + place, (float(p[place]), float(q[place]))
    if first is None:
        return None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first[0]), tensor.shape)) if tensor.shape else ()
    return Difference(name, tensor, count, index, first[1], largest)


def _boxes(tensor: Known) -> Iterator[tuple[int, int]]:
    """Ranges of rows, of at most about `_BOX` bytes."""
    rows = tensor.shape[0] if tensor.shape else 1
    row = max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize)
    step = max(1, _BOX // row)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _unequal(p: Tensor, q: Tensor, tolerance: float) -> Tensor:
    """Indices at which two flat tensors differ."""
    bits = _BITS[p.dtype.itemsize]
    unequal = p.view(bits) != q.view(bits)
    if tolerance and unequal.any():
        unequal &= ~((p.double() - q.double()).abs() <= tolerance)  # so written, NaN is no closeness
    return unequal.nonzero().flatten()


def _open(folder: Path) -> Side:
    if (folder / METADATA).exists():
        return _Checkpoint(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if paths:
        return _Published(paths)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    raise CheckpointError(
        f"{folder}: neither a checkpoint (a folder like checkpoints/<phase>/step_00001500) nor a Hugging Face folder "
        "with *.safetensors"
    )


class _Checkpoint:
    """A generation, its stacks of layers taken apart."""

    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        self.tensors: dict[str, Known] = {}
        for key in self._reader.tensors:
            shape, dtype, stack = self._reader.shape(key), self._reader.dtype(key), _STACKED.fullmatch(key)
            if not stack or not shape:
                self.tensors[key] = Known(key, None, shape, dtype)
                continue
            for layer in range(shape[0]):
                name = f"{stack[1]}decoder.layers.{layer}.{stack[2]}"
                self.tensors[name] = Known(key, layer, shape[1:], dtype)

    def read(self, tensor: Known, start: int, stop: int) -> Tensor:
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        offset = (start, *(0 for _ in tensor.shape[1:])) if tensor.shape else ()
        target = torch.empty(shape, dtype=tensor.dtype)
        stacked = target if tensor.layer is None else target.unsqueeze(0)
        place = offset if tensor.layer is None else (tensor.layer, *offset)
        self._reader.read([Request(tensor.key, place, stacked)])
        return target

    def close(self) -> None:
        """Nothing is held open."""


class _Published:
    """The safetensors files of a Hugging Face folder."""

    def __init__(self, paths: list[Path]) -> None:
        self.tensors: dict[str, Known] = {}
        self._of: dict[str, SafetensorsFile] = {}
        self._files: list[SafetensorsFile] = []
        for path in paths:
            file = SafetensorsFile(path)
            self._files.append(file)
            for key, stored in file.tensors.items():
                if key in self._of:
                    raise CheckpointError(f"{path}: has {key}, which {self._of[key].path.name} has, too")
                self.tensors[key], self._of[key] = Known(key, None, stored.shape, stored.dtype), file

    def read(self, tensor: Known, start: int, stop: int) -> Tensor:
        return self._of[tensor.key].read(tensor.key, start, stop)

    def close(self) -> None:
        for file in self._files:
            file.close()


def describe(found: Comparison, every: bool = False, tolerance: float = 0.0) -> str:
    """The first difference, or all of them, and a summary in the last line."""
    lines = [f"only in the first: {name}" for name in found.only_a]
    lines += [f"only in the second: {name}" for name in found.only_b]
    lines += [f"unlike: {said}" for said in found.unlike]
    lines += [str(difference) for difference in found.differences[: None if every else 1]]
    if not every and len(found.differences) > 1:
        lines.append(f"... and {len(found.differences) - 1} more tensors (--all names them)")
    if found.equal:
        how = f"within {tolerance:g}" if tolerance else "bit for bit"
        return f"same: {found.same} tensors, {found.numbers:,} numbers, {how}"
    counts = [
        (len(found.differences), "differ"),
        (len(found.unlike), "are of another shape or dtype"),
        (len(found.only_a), "are only in the first"),
        (len(found.only_b), "are only in the second"),
        (found.same, "are the same"),
    ]
    return "\n".join([*lines, "different: tensors: " + ", ".join(f"{count} {what}" for count, what in counts if count)])
