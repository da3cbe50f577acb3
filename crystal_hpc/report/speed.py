"""How fast a run's steps were and what they were made of, phase by phase: a table of the report."""

import math
import statistics
from collections.abc import Iterable

from crystal_hpc.report.history import History
from crystal_hpc.report.records import PlannedPhase, Step

HEADS = [
    *("phase", "tokens/s", "by rank", "MFU", "a step"),
    *("data wait", "forward-backward", "gradient sync", "optimizer", "wait for a save", "other"),
]
DASH = "\N{EN DASH}"


def speed_rows(history: History) -> list[list[str]]:
    """Cells under `HEADS` for each phase that has begun: medians, then each part's share of all steps' time.

    Parts are those of rank 0; a dash where the metrics do not tell, as those of older runs.
    """
    ranks = {attempt.number: attempt.ranks for attempt in history.attempts}
    rows = []
    for phase in history.phases:
        steps = [step for step in history.steps if step.phase == phase.name and step.seconds > 0]
        if steps:
            rows.append([phase.name, *_medians(phase, steps, ranks), *_shares(steps)])
    return rows


def _medians(phase: PlannedPhase, steps: list[Step], ranks: dict[int, int | None]) -> list[str]:
    tokens = phase.tokens / max(phase.steps, 1)
    of_a_rank = [tokens / step.seconds / count for step in steps if (count := ranks.get(step.attempt))]
    utilisation = _median(step.mfu for step in steps)
    return [
        _said(_median(tokens / step.seconds for step in steps), "{:,.0f}"),
        _said(_median(of_a_rank), "{:,.0f}"),
        _said(utilisation, "{:.1%}"),
        _said(_median(step.seconds for step in steps), "{:.3g} s"),
    ]


def _shares(steps: list[Step]) -> list[str]:
    """Of the steps whose parts are known, and of waiting for data in all of them."""
    waited = math.fsum(step.wait for step in steps) / math.fsum(step.seconds for step in steps)
    measured = [step for step in steps if math.isfinite(step.forward_backward)]
    if not measured:
        return [f"{waited:.1%}", *[DASH] * 5]
    total = math.fsum(step.seconds for step in measured)
    names = ("wait", "forward_backward", "gradient_sync", "optimizer", "save_wait")
    shares = [math.fsum(getattr(step, name) for step in measured) / total for name in names]
    return [f"{share:.1%}" for share in (waited, *shares[1:], max(1 - math.fsum(shares), 0.0))]


def _median(numbers: Iterable[float]) -> float:
    finite = [number for number in numbers if math.isfinite(number)]
    return statistics.median(finite) if finite else math.nan


def _said(number: float, form: str) -> str:
    return form.format(number) if math.isfinite(number) else DASH
