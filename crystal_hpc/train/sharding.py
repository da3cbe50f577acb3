"""Which boxes of which tensors of the whole model this rank holds, for saving and for loading.

Megatron-core says where a parameter of this rank belongs in the model (its name, the slice of tensor parallelism, the
layer of a pipeline stage). What it does not offer is a form of the distributed optimizer's state that any layout can
read: its `dp_reshardable` keeps flat buffers that only fit the same tensor and pipeline layout, and its
`fully_reshardable` first gathers everything on one rank. Here each rank writes what it has. A data-parallel rank's
share of a parameter is a stretch of it, and a stretch of a matrix is three boxes at most: the rest of one row, whole
rows, the beginning of another. Boxes of whole tensors are what `distcp` stores, so no rank waits for another, and any
layout, distributed optimizer or not, reads what any other has written.

Names are Megatron's for optimizers that are not distributed: `optimizer.state.exp_avg.<parameter>`.
"""

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crystal_hpc.errors import CheckpointError
from crystal_hpc.model import backend
from crystal_hpc.train import optim
from crystal_hpc.train.distcp import Index, boxes
from crystal_hpc.train.keys import MAIN, MOMENTS, STATE
from crystal_hpc.train.step import Trainer

with backend.quiet():
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

SMALLEST_SHARE = 1 << 20  # bytes; a smaller part of a tensor is not worth a chunk of its own


@dataclass(frozen=True)
class Part:
    """A box of a tensor of the whole model, as a view of this rank's memory."""

    key: str
    shape: Index
    """Of the whole tensor."""
    offset: Index
    tensor: Tensor
    ours: bool
    """Whether this rank is the one that saves it; of equal copies one is saved."""


@dataclass(frozen=True)
class _Place:
    """Where a contiguous stretch of one of this rank's parameters lies in the model."""

    key: str
    shape: Index
    offset: Index
    size: Index
    start: int
    """First element of the stretch in the parameter."""
    held: Index
    """`size` without what pads the feed-forward width; no checkpoint has that (`config.memory.padded_ffn`)."""
    ours: bool
    """Whether this rank, and those that differ only in their data-parallel rank, are the ones that save it."""

    @property
    def stop(self) -> int:
        return self.start + torch.Size(self.size).numel()


def module(trainer: Trainer) -> torch.nn.Module:
    """The model itself, out of Megatron's data-parallel and precision wrappers."""
    inner: Any = trainer.model
    while hasattr(inner, "module"):
        inner = inner.module
    model: torch.nn.Module = inner
    return model


def model_parts(model: torch.nn.Module) -> list[Part]:
    """The weights as the forward pass uses them; every rank of a data-parallel group saves a part of the group's."""
    parameters = dict(model.named_parameters())
    return [
        part
        for number, (name, places) in enumerate(_places(model).items())
        for part in _shared(places, "", parameters[name].detach().view(-1), number)
    ]


def optimizer_parts(trainer: Trainer) -> list[Part]:
    """Adam's moments, and the float32 weights where the model's own are not; all of them must exist already."""
    model = module(trainer)
    by_name, places = dict(model.named_parameters()), _places(model)
    held = {id(parameter): stretch for parameter, stretch in optim.states(trainer.optimizer)}
    parts: list[Part] = []
    for number, (name, parameter) in enumerate(by_name.items()):
        stretch = held.get(id(parameter))
        if stretch is None:  # another data-parallel rank has all of it
            continue
        tensors = {kind: stretch.state[kind] for kind in MOMENTS}
        if parameter.dtype != torch.float32:
            tensors[MAIN] = stretch.main
        for kind, tensor in tensors.items():
            flat, prefix = tensor.detach().view(-1), f"{STATE}{kind}."
            if stretch.distributed:
                parts += _cut(places[name], prefix, flat, stretch.start, None)
            else:
                parts += _shared(places[name], prefix, flat, number)
    return parts


def _shared(places: list[_Place], prefix: str, flat: Tensor, number: int) -> Iterator[Part]:
    """What all ranks of a data-parallel group hold alike: whole when read, a rank's share of it when saved."""
    rank, size = data_rank(), data_size()
    shares = max(1, min(size, flat.nbytes // SMALLEST_SHARE))
    mine = (rank - number) % size  # small tensors, whole, go round the ranks
    edges = [len(flat) * mine // shares, len(flat) * (mine + 1) // shares] if mine < shares else [0, 0]
    yield from _cut(places, prefix, flat, 0, (edges[0], edges[1]))


def _cut(places: list[_Place], prefix: str, flat: Tensor, start: int, saved: tuple[int, int] | None) -> Iterator[Part]:
    """Elements from `start` on of a parameter, as boxes; `saved`: those that this rank saves, None for all of them."""
    stop = start + len(flat)
    inner = sorted({start, stop, *(saved or ())})
    for place in places:
        edges = sorted({place.start, place.stop, *(edge for edge in inner if place.start < edge < place.stop)})
        for first, last in zip(edges, edges[1:], strict=False):
            if first < start or last > stop:
                continue
            ours = place.ours and (saved is None or saved[0] <= first < saved[1])
            at = first - start
            for offset, size in boxes(place.size, first - place.start, last - place.start):
                length = torch.Size(size).numel()
                box, at = flat[at : at + length].view(size), at + length
                kept = [min(width, end - begin) for width, end, begin in zip(size, place.held, offset, strict=True)]
                if min(kept, default=1) <= 0:
                    continue
                where = tuple(a + b for a, b in zip(place.offset, offset, strict=True))
                yield Part(prefix + place.key, place.shape, where, box[tuple(slice(width) for width in kept)], ours)


def _places(model: torch.nn.Module) -> dict[str, list[_Place]]:
    """Where each parameter of this rank, by its name here, lies in the whole model; a SwiGLU's is in two places."""
    return _entries(model)[0]


@functools.lru_cache(maxsize=1)
def _entries(model: Any) -> tuple[dict[str, list[_Place]], dict[str, bytes]]:
    """What Megatron says of a model: places by parameter, and objects. Asked once, as asking takes a while."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    parameters = dict(model.named_parameters())
    places: dict[str, list[_Place]] = {}
    others: dict[str, bytes] = {}
    for name, entry in model.sharded_state_dict(metadata={"dp_cp_group": group}).items():
        if isinstance(entry, ShardedObject):
            others |= _object(entry, _keeps_nothing(model))
            continue
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        places[name] = [_without_padding(_place(piece, parameters[name]), name, model) for piece in pieces]
    missing = parameters.keys() - places.keys()
    assert not missing, f"Megatron does not say where {sorted(missing)} belong"
    return {name: places[name] for name in parameters}, others


def _without_padding(place: _Place, name: str, model: Any) -> _Place:
    """The place in a model whose feed-forward width is as its config says, rather than padded for the kernels."""
    padded, width = model.config.ffn_hidden_size, model.ffn
    kind = name.rpartition("mlp.")[2]
    if padded == width or kind not in ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight"):
        return place
    axis = len(place.shape) - (2 if kind == "linear_fc1.weight" else 1)
    half, first = divmod(place.offset[axis], padded)  # of SwiGLU's two halves, each of which is padded
    return replace(
        place,
        shape=_at(place.shape, axis, place.shape[axis] // padded * width),
        offset=_at(place.offset, axis, half * width + first),
        held=_at(place.size, axis, max(0, min(place.size[axis], width - first))),
    )


def _at(index: Index, axis: int, value: int) -> Index:
    return (*index[:axis], value, *index[axis + 1 :])


def _place(piece: ShardedTensor, parameter: Tensor) -> _Place:
    assert piece.data.is_contiguous(), piece.key
    size = (*(1 for _ in range(piece.prepend_axis_num)), *piece.local_shape)
    return _Place(
        key=piece.key,
        shape=tuple(piece.global_shape),
        offset=tuple(piece.global_offset),
        size=size,
        held=size,
        start=(piece.data.data_ptr() - parameter.data_ptr()) // parameter.element_size(),
        # The last number tells the data-parallel ranks apart; the ones before it, any other copies.
        ours=not any(piece.replica_id[:-1]),
    )


def objects(model: torch.nn.Module) -> dict[str, bytes]:
    """What Megatron keeps of a module beside its tensors, as its own loader wants to find it; read by nobody here.

    These are the scales that Transformer Engine keeps from step to step: nothing, unless `fp8.recipe` is `delayed`.
    Raises CheckpointError where there is something, which a pickle of Transformer Engine's would have to carry.
    """
    for name, module in model.named_modules():
        has_more = type(module).get_extra_state is not torch.nn.Module.get_extra_state
        if has_more and not _keeps_nothing(model):
            _refuse_content(name, module.get_extra_state())  # asked each time: there is none before the first step
    return _entries(model)[1]


def _keeps_nothing(model: Any) -> bool:
    """Whether nothing goes from step to step, though older Transformer Engines then write down the recipe itself."""
    return model.config.fp8 is not None and model.config.fp8_recipe != "delayed"


def _object(entry: ShardedObject, keeps_nothing: bool) -> dict[str, bytes]:
    data = torch.empty(0, dtype=torch.uint8) if keeps_nothing else entry.data
    copies = entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)
    if any(copies):
        return {}
    buffer = io.BytesIO()
    torch.save([data], buffer)
    return {entry.unique_key: buffer.getvalue()}


def _refuse_content(name: str, data: Any) -> None:
    empty = data is None or (isinstance(data, Tensor) and not data.numel())
    empty = empty or (isinstance(data, io.BytesIO) and not data.getbuffer().nbytes)
    if not empty:
        raise CheckpointError(f"{name}: keeps FP8 scales from step to step, which checkpoints do not carry")


def data_rank() -> int:
    """This rank's number among those that hold the same weights."""
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def data_size() -> int:
    """Ranks that hold the same weights as this one."""
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
