"""What one layout saves, any other loads: every weight, moment and step count, bit for bit.

All layouts of tensor, pipeline and data parallelism of one and two each that fit four ranks, with and without the
distributed optimizer, in both precisions. One group of four processes goes through all of it.
"""

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import branch, generation, run_ranks, short_run, unlike, values

from crystal_hpc.train.distcp import Reader, Request
from crystal_hpc.train.manifest import read_manifest

STEP = 3
LAYOUTS = [
    (tensor, pipeline, data, distributed)
    for tensor, pipeline, data in itertools.product((1, 2), repeat=3)
    if tensor * pipeline * data <= 4
    for distributed in (False, True)
]
Layout = tuple[int, int, int, bool]


def name(layout: Layout) -> str:
    tensor, pipeline, data, distributed = layout
    return f"TP{tensor}-PP{pipeline}-DP{data}{'-distributed' if distributed else ''}"


def reshard(rank: int, _size: int, meeting: str, origin: Path, room: Path, every: int) -> list[str]:
    """Saves a state under every layout, then loads what each saved under each other; returns what is wrong.

    With `every` = 3, each loads what a third of the others have saved, and not all the same third.
    """
    wrong: list[str] = []
    for layout in LAYOUTS:
        with _as_rank(rank, room / f"{meeting}-{name(layout)}-saves", layout, origin) as trainer:
            if trainer:
                _save(trainer, origin, room / name(layout))
    for number, layout in enumerate(LAYOUTS):
        with _as_rank(rank, room / f"{meeting}-{name(layout)}-loads", layout, origin) as trainer:
            for other in LAYOUTS[number % every :: every] if trainer else []:
                problems = _load(trainer, room / name(other), generation(origin, STEP))
                wrong += [
                    f"{problem}, as {name(other)} saved it, in rank {rank} of {name(layout)}" for problem in problems
                ]
    return wrong


@contextlib.contextmanager
def _as_rank(rank: int, meeting: Path, layout: Layout, origin: Path) -> Iterator[Any]:
    """A trainer of this rank under a layout; None for a rank that the layout has no use for."""
    from crystal_hpc.config.load import load_run
    from crystal_hpc.model import parallel
    from crystal_hpc.train.step import build_trainer

    tensor, pipeline, data, distributed = layout
    size = tensor * pipeline * data
    if rank >= size:
        yield None
        return
    settings = {"tensor": tensor, "pipeline": pipeline, "distributed_optimizer": str(distributed).lower()}
    run = load_run(origin / "run.yaml", [f"parallel.{key}={value}" for key, value in settings.items()])
    yield build_trainer(run, parallel.start(run, rank, size, rank, meeting))
    parallel.stop()
    gc.collect()  # of the model before, and with it of its process groups, whose threads look around all day


def _save(trainer: Any, origin: Path, folder: Path) -> None:
    from crystal_hpc.data.order import run_orders
    from crystal_hpc.data.sources import read_sources
    from crystal_hpc.train.checkpoint import Saver
    from crystal_hpc.train.restore import load_latest

    position, _ = load_latest(trainer, origin)
    orders = run_orders(trainer.run, {key: info.tokens for key, info in read_sources(trainer.run).training.items()})
    saver = Saver(trainer, folder, orders)
    saver.save(position, "asked for")
    saver.close()


def _load(trainer: Any, folder: Path, reference: Path) -> list[str]:
    """The keys that are not what the reference holds; whatever was in memory before is overwritten first."""
    import torch

    from crystal_hpc.train import optim, sharding
    from crystal_hpc.train.restore import load_latest

    optim.reset_state(trainer.optimizer)
    parts = sharding.model_parts(sharding.module(trainer)) + sharding.optimizer_parts(trainer)
    with torch.no_grad():
        for part in parts:
            part.tensor.fill_(7.0)
    load_latest(trainer, folder)
    parts = sharding.model_parts(sharding.module(trainer)) + sharding.optimizer_parts(trainer)
    wrong = unlike(parts, reference)
    for inner in optim._inner_optimizers(trainer.optimizer):
        counts = {int(state.get("step", STEP)) for state in inner.state.values()}
        counts |= {int(group.get("step", STEP)) for group in inner.param_groups}
        wrong += [f"step count {count}" for count in counts - {STEP}]
    return wrong + ([] if optim.steps(trainer.optimizer) == STEP else ["step count"])


@pytest.mark.parametrize(("precision", "every"), [("fp32", 3), ("bf16", 1)])
def test_what_any_layout_saves_any_other_loads_bit_equal(
    new_run: Callable[..., Path], tmp_path: Path, precision: str, every: int
) -> None:
    whole = short_run(new_run, 1, f"precision={precision}")
    origin, room = branch(whole, tmp_path / "origin", STEP), tmp_path / "room"
    room.mkdir()
    assert sum(values(run_ranks(reshard, 4, origin, room, every)), []) == []
    expected = read_manifest(generation(origin, STEP))
    for layout in LAYOUTS:
        place = generation(room / name(layout), STEP)
        assert_same_tensors(place, generation(origin, STEP))
        manifest = read_manifest(place)
        assert manifest.layout["ranks"] == layout[0] * layout[1] * layout[2] == len(list(place.glob("*.distcp")))
        assert (manifest.ledger, manifest.optimizer) == (expected.ledger, expected.optimizer)
        assert manifest.tensors.keys() == expected.tensors.keys()
        for key, tensor in manifest.tensors.items():
            other = expected.tensors[key]
            assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
            assert tensor.norm == pytest.approx(other.norm, rel=1e-6), key  # float32 blocks, cut elsewhere


def assert_same_tensors(place: Path, other: Path) -> None:
    import torch

    one, two = Reader(place), Reader(other)
    assert one.tensors.keys() == two.tensors.keys()
    for key in one.tensors:
        assert (one.shape(key), one.dtype(key)) == (two.shape(key), two.dtype(key))
        found = [torch.empty(one.shape(key), dtype=one.dtype(key)) for _ in range(2)]
        for reader, target in zip((one, two), found, strict=True):
            reader.read([Request(key, (0,) * target.ndim, target)])
        assert torch.equal(*found), f"{key} in {place}"
