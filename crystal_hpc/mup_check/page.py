"""A sweep drawn: `coordinates.svg` and `transfer.svg`, each with muP and without side by side, and a page of both.

The drawings carry their own style, so that a page of documentation can show them as images.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config.schema import Run
from crystal_hpc.mup_check import figures
from crystal_hpc.mup_check.points import LABELS
from crystal_hpc.report import chart
from crystal_hpc.report.chart import Frame, text

_WIDTH, _HEIGHT, _TOP = 540, 380, 84
SHOWN = 0.85
"""Share of the losses that the drawing of the transfer spans; the rest, at the largest rates, is far above."""
_STYLE = """
svg{--page:#fbfbf9;--ink:#16161a;--soft:#55545a;--faint:#6f6e74;--rule:#e3e2dc;--rest:#b4b3ac;background:var(--page);
font-family:system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg{--page:#17171a;--ink:#f1f0ec;--soft:#bdbcb6;--faint:#a3a29e;--rule:#323236;
--rest:#5d5d63}}
.line{fill:none;stroke:var(--t);stroke-width:2}
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>muP check</title>
<style>
body{max-width:1120px;margin:32px auto;padding:0 20px;font:15px/1.5 system-ui,sans-serif;color-scheme:light dark}
</style>
"""
Curve = Mapping[float, float | None]


def write_page(folder: Path, run: Run, results: Sequence[figures.Result]) -> list[str]:
    """Draws what the results have; returns lines that say what they come to."""
    parts = [f"<h1>muP check of {text(run.name)}</h1>"]
    said: list[str] = []
    for name, draw, tell in (
        ("coordinates", draw_coordinates, tell_coordinates),
        ("transfer", draw_transfer, tell_transfer),
    ):
        if any(one["kind"] == name for one in results):
            drawing, lines = draw(results), tell(results)
            files.write_file(folder / f"{name}.svg", drawing)
            parts += [drawing, f"<pre>{text(chr(10).join(lines))}</pre>"]
            said += lines
    files.write_file(folder / "report.html", _PAGE + "\n".join(parts) + "\n</html>\n")
    return said


def tell_coordinates(results: Sequence[figures.Result]) -> list[str]:
    """A table of slopes after the last step, and a verdict for each parametrisation."""
    lines = [f"{'slope of the change over widths':<34}{'first step':>12}{'last step':>12}"]
    for mup, label in LABELS.items():
        for part, by_step in figures.slopes(results, mup).items():
            lines.append(f"{label + ': ' + part:<34}{_signed(by_step[1]):>12}{_signed(by_step[-1]):>12}")
    for mup, label in LABELS.items():
        low, high = figures.extremes(results, mup)
        word = "flat" if -figures.FLAT <= low <= high <= figures.FLAT else "not flat"
        slopes = f"slopes from {low:+.2f} to {high:+.2f} (flat: within {figures.FLAT:g})"
        lines.append(f"{label}: {word}; {'some widths diverged' if math.isnan(low) else slopes}")
    return lines


def tell_transfer(results: Sequence[figures.Result]) -> list[str]:
    """The best learning rate by width, and what it costs to take that of the narrowest."""
    lines = [f"{'':<12}{'width':>8}{'best rate':>12}{'loss':>9}   loss at the narrowest width's best rate"]
    for mup, label in LABELS.items():
        for width, best in figures.best_rates(results, mup).items():
            moved = "diverged" if best.transferred is None else f"{best.transferred:.3f}"
            lines.append(f"{label:<12}{width:>8}{best.rate:>12g}{best.loss:>9.3f}   {moved}")
    return lines


def draw_coordinates(results: Sequence[figures.Result]) -> str:
    """The change of each activation after the last step, by width, as a multiple of that of the narrowest width."""
    panels = {}
    for mup in LABELS:
        curves = {}
        for part in _few(list(figures.slopes(results, mup))):
            sizes = figures.by_width(results, mup, part, -1)
            first = next(iter(sizes.values()))  # without it, or a size, there is no point
            curves[part] = {
                width: _logarithm(size / first) if size and first else None for width, size in sizes.items()
            }
        panels[mup] = curves
    return _panels(
        panels,
        "change of activations since step 0, relative to the narrowest width",
        "width",
        y_name=lambda octave: f"{2**octave:g}\N{MULTIPLICATION SIGN}",
        least=(-1.0, 2.0),
    )


def draw_transfer(results: Sequence[figures.Result]) -> str:
    """Loss at the end by learning rate, a line a width, the best of each marked; what is off the scale is left out."""
    found = {mup: figures.losses(results, mup) for mup in LABELS}
    every = [by_rate for by_width in found.values() for by_rate in by_width.values()]
    finite = sorted(loss for by_rate in every for loss in by_rate.values() if loss is not None)
    most = finite[int(SHOWN * (len(finite) - 1))] if finite else 0.0

    def cut(by_rate: Curve) -> Curve:
        return {rate: loss if loss is not None and loss <= most else None for rate, loss in by_rate.items()}

    shown = {
        mup: {f"width {width}": cut(by_rate) for width, by_rate in by_width.items()} for mup, by_width in found.items()
    }
    return _panels(shown, "loss after the last step, nats a token", "peak learning rate", mark_least=True)


def _panels(
    panels: Mapping[bool, Mapping[str, Curve]],
    title: str,
    x_name: str,
    y_name: Any = lambda value: f"{value:.4g}",
    least: tuple[float, float] | None = None,
    mark_least: bool = False,
) -> str:
    """Two plots side by side, on the same axes. `x` is drawn by its logarithm; `least` is what y spans at least."""
    curves = [curve for panel in panels.values() for curve in panel.values()]
    xs = sorted({x for curve in curves for x in curve})
    ys = [y for curve in curves for y in curve.values() if y is not None]
    low, high = min([*ys, *(least or ())]), max([*ys, *(least or ())])
    margin = 0.05 * (high - low) or 0.5
    span = round(1000 * _logarithm(xs[-1] / xs[0]))
    frame = Frame(_WIDTH, _HEIGHT, _TOP, 46, span, low - margin, high + margin, right=24)
    drawn = []
    for index, (mup, panel) in enumerate(panels.items()):
        body = "".join((*_axes(frame, xs, x_name, y_name), *_curves(frame, panel, xs[0], mark_least)))
        name = {True: "With muP", False: "Standard parametrisation"}[mup]
        heading = f'<text class="name" x="{frame.left}" y="16">{name}</text>'
        heading += f'<text x="{frame.left}" y="32">{text(title)}</text>'
        drawn.append(f'<g transform="translate({index * _WIDTH},0)">{heading}{_legend(frame, list(panel))}{body}</g>')
    size = f'viewBox="0 0 {2 * _WIDTH} {_HEIGHT}" width="{2 * _WIDTH}" height="{_HEIGHT}"'
    style = f"<style>{chart.STYLE}{_STYLE}</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{text(title)}" {size}>{style}'
        f"{''.join(drawn)}</svg>\n"
    )


def _axes(frame: Frame, xs: Sequence[float], x_name: str, y_name: Any) -> list[str]:
    parts = []
    for tick in chart.nice_ticks(frame.low, frame.high, 6):
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{frame.left},{y:.1f}H{frame.width - frame.right}"/>')
        parts.append(f'<text text-anchor="end" x="{frame.left - 6}" y="{y + 4:.1f}">{text(y_name(tick))}</text>')
    parts.append(f'<path class="axis" d="M{frame.left},{frame.floor}H{frame.width - frame.right}"/>')
    for x in xs:
        place = frame.x(1000 * _logarithm(x / xs[0]))
        parts.append(f'<path class="axis" d="M{place:.1f},{frame.floor}v4"/>')
        parts.append(f'<text text-anchor="middle" x="{place:.1f}" y="{frame.floor + 18}">{x:g}</text>')
    middle = (frame.left + frame.width - frame.right) / 2
    return [*parts, f'<text text-anchor="middle" x="{middle:.1f}" y="{frame.floor + 36}">{text(x_name)}</text>']


def _curves(frame: Frame, panel: Mapping[str, Curve], first: float, mark_least: bool) -> list[str]:
    parts = []
    for index, (name, curve) in enumerate(panel.items()):
        known = {x: y for x, y in curve.items() if y is not None}
        path, pen = "", "M"
        for x, y in curve.items():
            path += f"{pen}{frame.x(1000 * _logarithm(x / first)):.1f},{frame.y(y):.1f}" if y is not None else ""
            pen = "M" if y is None else "L"
        parts.append(f'<path class="line {_tone(index)}" d="{path}"/>')
        marked = [min(known, key=lambda x: known[x])] if mark_least and known else list(known)
        for x in marked:
            place = frame.x(1000 * _logarithm(x / first)), frame.y(known[x])
            title = f"<title>{text(name)}, {x:g}: {known[x]:.4g}</title>"
            parts.append(f"<path {chart.mark(index, _tone(index), *place)}>{title}</path>")
    return parts


def _legend(frame: Frame, names: Sequence[str]) -> str:
    """Names of the curves, in one row or two."""
    columns = 4
    wide = (frame.width - frame.left) / columns
    parts = []
    for index, name in enumerate(names):
        x, y = frame.left + 6 + wide * (index % columns), 50 + 18 * (index // columns)
        parts.append(f"<path {chart.mark(index, _tone(index), x, y)}/>")
        parts.append(f'<text x="{x + 10:.1f}" y="{y + 4}">{text(name)}</text>')
    return "".join(parts)


def _few(parts: list[str]) -> list[str]:
    """Embedding, first and last layer, final norm and logits: what a drawing has colours for."""
    return parts if len(parts) <= chart.TONES else [*parts[:3], *parts[-4:]]


def _tone(index: int) -> str:
    return f"t{index % chart.TONES}"


def _logarithm(ratio: float) -> float:
    return math.log2(ratio)


def _signed(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:+.2f}"
