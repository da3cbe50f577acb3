"""One point of a sweep, trained from its first step to its last on this rank alone, with the package's own step."""

import math
from collections.abc import Callable
from typing import Any

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.data.batches import PhaseBatches
from crystal_hpc.data.fim import load_fims
from crystal_hpc.data.order import run_orders
from crystal_hpc.data.sources import open_source, read_sources
from crystal_hpc.model.parallel import Layout
from crystal_hpc.mup_check.coordinates import Probe
from crystal_hpc.mup_check.points import Point
from crystal_hpc.train.step import build_trainer, train_step

LAST = 10
"""The loss of a training is the mean over the last tenth of its steps."""


def train_point(point: Point, layout: Layout, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """Trains a point; None if `stopped` says so before the end.

    `loss` (nats, mean of the last tenth of the steps) and `losses` of all steps; for the coordinate check also `sizes`
    and `changes` by activation, each before the first step and after every one. What is not finite is None, as JSON
    has no word for it.
    """
    phase = point.run.phases[0]
    batches = _batches(point.run)
    trainer = build_trainer(point.run, layout)
    probe = Probe(trainer, batches.read(0)) if point.kind == "coordinates" else None
    measured = [probe.sizes()] if probe else []
    losses: list[float] = []
    for step in range(derive.phase_steps(phase)):
        if stopped():
            batches.close()
            return None
        losses.append(train_step(trainer, batches.step(step), derive.learning_rate(phase, step), []).loss)
        measured += [probe.sizes()] if probe else []
    batches.close()
    tail = losses[-max(len(losses) // LAST, 1) :]
    result: dict[str, Any] = {"loss": _finite(math.fsum(tail) / len(tail)), "losses": [_finite(one) for one in losses]}
    for index, kind in enumerate(("sizes", "changes") if probe else ()):
        result[kind] = {part: [_finite(one[index][part]) for one in measured] for part in measured[0][index]}
    return result


def _batches(run: Run) -> PhaseBatches:
    """The batches of the run's one phase, all on this rank."""
    infos = read_sources(run).training
    opened = {name: open_source(info, run.model.vocab_size, run.data.check) for name, info in infos.items()}
    (order,) = run_orders(run, {name: info.tokens for name, info in infos.items()})
    (fim,) = load_fims(run)
    return PhaseBatches(order, opened, run.phases[0].batch_size, run.parallel.micro_batch, fim=fim)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
