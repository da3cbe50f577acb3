"""What a sweep trains: the run of a config at other widths and learning rates, with muP and without.

Pure: no torch, no files. A point is one short training of one width at one rate; the sweep is a list of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crystal_hpc.config import derive
from crystal_hpc.config.check import run_problems
from crystal_hpc.config.compute import Parallel
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import ConfigError

Kind = Literal["coordinates", "transfer"]
LABELS = {True: "muP", False: "standard"}


@dataclass(frozen=True)
class Sweep:
    """What is asked for, as `sweep.json` keeps it."""

    widths: Sequence[int]
    """Values of model.hidden in the transfer sweep; heads keep their width, `ffn` its proportion."""
    rates: Sequence[float]
    """Its peak learning rates (base: of embeddings, norms and biases); may be empty."""
    steps: int
    """Steps of each of its trainings."""
    coordinate_widths: Sequence[int]
    """Widths of the coordinate check."""
    coordinate_rate: float
    """Its one learning rate, which should be small: what is compared is the first order of what a step does."""
    coordinate_steps: int
    """Its steps; 0 for no coordinate check."""


@dataclass(frozen=True)
class Point:
    """One short training."""

    kind: Kind
    mup: bool
    width: int
    rate: float
    run: Run
    """The run that is trained: one phase, one rank."""

    @property
    def name(self) -> str:
        """Names its file."""
        return f"{self.kind}-{LABELS[self.mup]}-width{self.width}-rate{self.rate:g}"

    @property
    def about(self) -> dict[str, Any]:
        """What its file says of it besides the result."""
        about = {"kind": self.kind, "mup": self.mup, "width": self.width, "rate": self.rate}
        return {**about, "digest": derive.run_digest(self.run)}


def points(run: Run, sweep: Sweep) -> list[Point]:
    """All points, those that take longest first, so that workers end at about the same time.

    Raises ConfigError for what cannot be swept.
    """
    problems = list(dict.fromkeys(_problems(run, sweep)))
    if problems:
        raise ConfigError(problems, f"run {run.name}")
    found = []
    for mup in (True, False):
        for width in set(sweep.widths) if sweep.rates else ():
            for rate in set(sweep.rates):
                found.append(Point("transfer", mup, width, rate, at_width(run, width, mup, rate, sweep.steps)))
        for width in set(sweep.coordinate_widths) if sweep.coordinate_steps else ():
            rate, steps = sweep.coordinate_rate, sweep.coordinate_steps
            short = at_width(run, width, mup, rate, steps, constant=True)
            found.append(Point("coordinates", mup, width, rate, short))
    problems = list(
        dict.fromkeys(f"width {point.width}: {said}" for point in found for said in run_problems(point.run))
    )
    if problems:
        raise ConfigError(problems, f"run {run.name}")
    return sorted(found, key=lambda point: (-point.width, point.name))


def at_width(run: Run, width: int, mup: bool, rate: float, steps: int, constant: bool = False) -> Run:
    """The first phase of a run, shortened, on one rank, with the model made `width` wide.

    Without muP the model is in standard parametrisation (table 3 of arXiv 2203.03466): one learning rate, no
    multipliers, scores divided by the root of the head width. Its weights still start with a variance of 1 / width, as
    muP's matrices do, and equal to them at the base width: so what differs is muP, not a careless init.

    The rate rises to its peak in the first tenth of the steps and falls to zero; `constant` holds it from the start.
    """
    model, phase = run.model, run.phases[0]
    assert run.mup is not None
    std = model.init_std if mup else model.init_std * math.sqrt(run.mup.base_hidden / width)
    shape = {"hidden": width, "heads": width * model.heads // model.hidden, "ffn": model.ffn * width // model.hidden}
    schedule = {"peak": rate, "warmup_steps": 0, "decay": "constant", "end": 0.0, "decay_steps": None}
    if not constant:
        schedule |= {"warmup_steps": -(-steps // 10), "decay": "linear"}
    sources = {name: store for name, store in run.data.sources.items() if name in phase.mixture}
    read = {"sources": sources, "held_out": {}, "most_epochs": {}}
    short = {
        "steps": steps,
        "tokens": None,
        "learning_rate": phase.learning_rate.model_copy(update=schedule),
        "checkpoint_every": None,
        "keep_every": None,
    }
    return run.model_copy(
        update={
            "model": model.model_copy(update={**shape, "init_std": std}),
            "mup": run.mup if mup else None,
            "parallel": Parallel(micro_batch=run.parallel.micro_batch, distributed_optimizer=False),
            "data": run.data.model_copy(update=read),
            "fp8": None,  # the probe runs outside Megatron's schedule, where 8-bit copies of weights are not renewed
            "phases": [phase.model_copy(update=short)],
            "start_from": None,
        }
    )


def _problems(run: Run, sweep: Sweep) -> Iterator[str]:
    if run.mup is None:
        yield "mup: the run does not use it, so there is nothing to check; give it a base_hidden"
        return
    if not sweep.rates and not sweep.coordinate_steps:
        yield "nothing is asked for: give learning rates, or steps of the coordinate check"
    if sweep.steps < 1 or sweep.coordinate_steps < 0:
        yield "steps: at least 1, and at least 0 of the coordinate check"
    for rate in (*sweep.rates, sweep.coordinate_rate):
        if not 0 < rate < math.inf:
            yield f"learning rate {rate:g}: must be above 0"
    head = run.model.hidden // run.model.heads
    for widths in (sweep.widths, sweep.coordinate_widths):
        if len(set(widths)) < 2:
            yield "widths: give two or more, to compare them"
        for width in widths:
            if width < head or width % head:
                near = max(width // head, 1) * head
                yield (
                    f"width {width}: not a multiple of the heads' width, {head} (model.hidden / model.heads); "
                    f"choose {near} or {near + head}"
                )
            elif width * run.model.ffn < run.model.hidden:
                yield (
                    f"width {width}: leaves nothing of model.ffn = {run.model.ffn}, which keeps its proportion to "
                    f"model.hidden = {run.model.hidden}; choose {-(-run.model.hidden // run.model.ffn)} or more"
                )
