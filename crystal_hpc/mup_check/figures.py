"""What the results of a sweep come to: slopes over widths, and the best learning rate of each width. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLAT = 0.3
"""Largest slope that counts as flat. A wrong scaling shows as one of +-1/2 or +-1; finite widths as less than this."""

Result = Mapping[str, Any]


def slope(points: Mapping[float, float | None]) -> float | None:
    """Exponent of a power law through (width, size), by least squares of the logarithms; None if it has none."""
    if len(points) < 2 or not all(value is not None and value > 0 for value in points.values()):
        return None
    xs, ys = [math.log(x) for x in points], [math.log(y or 1.0) for y in points.values()]
    x_mean, y_mean = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    above = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return above / math.fsum((x - x_mean) ** 2 for x in xs)


def by_width(results: Sequence[Result], mup: bool, part: str, step: int, kind: str = "changes") -> dict[float, Any]:
    """Size of an activation after `step` steps (or its change since the start), by width."""
    chosen = [one for one in results if one["kind"] == "coordinates" and one["mup"] == mup]
    return {one["width"]: one[kind][part][step] for one in sorted(chosen, key=lambda one: int(one["width"]))}


def slopes(results: Sequence[Result], mup: bool, kind: str = "changes") -> dict[str, list[float | None]]:
    """Slope over the widths of each activation's change (or size), before the first step and after every one."""
    chosen = next((one for one in results if one["kind"] == "coordinates" and one["mup"] == mup), None)
    if chosen is None:
        return {}
    return {
        part: [slope(by_width(results, mup, part, step, kind)) for step in range(len(values))]
        for part, values in chosen[kind].items()
    }


def extremes(results: Sequence[Result], mup: bool) -> tuple[float, float]:
    """Smallest and largest slope of any activation's change after the last step; not-a-number if one has none."""
    last = [found[-1] for found in slopes(results, mup).values()]
    known = [value for value in last if value is not None]
    return (min(known), max(known)) if known and len(known) == len(last) else (math.nan, math.nan)


def diverged(results: Sequence[Result], mup: bool) -> list[int]:
    """Widths of the coordinate check at which some activation was no longer a number after the last step."""
    last = [by_width(results, mup, part, -1) for part in slopes(results, mup)]
    return sorted({int(width) for sizes in last for width, size in sizes.items() if size is None})


def unmoved(results: Sequence[Result], mup: bool) -> list[str]:
    """Activations whose change after the last step was zero at some width, so that they have no slope."""
    return [part for part in slopes(results, mup) if 0 in by_width(results, mup, part, -1).values()]


@dataclass(frozen=True)
class Best:
    """The best learning rate of one width."""

    rate: float
    loss: float
    transferred: float | None
    """Loss of this width at the rate that is best for the narrowest width; None if it diverged."""


def losses(results: Sequence[Result], mup: bool) -> dict[int, dict[float, float | None]]:
    """Loss by width and learning rate, both ascending."""
    found: dict[int, dict[float, float | None]] = {}
    chosen = [one for one in results if one["kind"] == "transfer" and one["mup"] == mup]
    for one in sorted(chosen, key=lambda one: (one["width"], one["rate"])):
        found.setdefault(one["width"], {})[one["rate"]] = one["loss"]
    return found


def best_rates(results: Sequence[Result], mup: bool) -> dict[int, Best]:
    """The best rate on the grid for each width of which some training did not diverge."""
    best: dict[int, Best] = {}
    first = None
    for width, by_rate in losses(results, mup).items():
        finite = {rate: loss for rate, loss in by_rate.items() if loss is not None}
        if finite:
            rate = min(finite, key=lambda rate: finite[rate])
            first = first or rate
            best[width] = Best(rate, finite[rate], by_rate.get(first))
    return best
