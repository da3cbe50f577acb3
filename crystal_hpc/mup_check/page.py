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
"""Share of the losses that the drawing of the transfer spans; to the rest, far above, lines lead out of the plot."""
_STYLE = """
svg{--page:#fbfbf9;--ink:#16161a;--soft:#55545a;--faint:#6f6e74;--rule:#e3e2dc;--rest:#b4b3ac;background:var(--page);
font-family:system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg{--page:#17171a;--ink:#f1f0ec;--soft:#bdbcb6;--faint:#a3a29e;--rule:#323236;
--rest:#5d5d63}}
.line{fill:none;stroke:var(--t);stroke-width:2}.dot{fill:var(--t)}
.chart .note{fill:var(--ink);paint-order:stroke;stroke:var(--page);stroke-width:3px}
"""
_DRAWING_STYLE = f"<style>{chart.STYLE}{_STYLE}</style>"
_HEAD = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>muP check</title>
<style>
body{{max-width:1120px;margin:32px auto;padding:0 20px;font:15px/1.5 system-ui,sans-serif;color-scheme:light dark}}
{chart.STYLE}{_STYLE}</style>
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
            parts += [drawing.replace(_DRAWING_STYLE, ""), f"<pre>{text(chr(10).join(lines))}</pre>"]
            said += lines
    files.write_file(folder / "report.html", _HEAD + "\n".join(parts) + "\n</html>\n")
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
        said = _missing(results, mup) or f"slopes from {low:+.2f} to {high:+.2f} (flat: within {figures.FLAT:g})"
        lines.append(f"{label}: {word}; {said}")
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
    """The change of each activation after the last step, by width, as a multiple of that of the narrowest width.

    What is not a number, or zero, is left out, and said; another width is then the narrowest.
    """
    panels: dict[bool, dict[str, Curve]] = {}
    for mup in LABELS:
        panels[mup] = {}
        for part in _few(list(figures.slopes(results, mup))):
            sizes = figures.by_width(results, mup, part, -1)
            first = next((size for size in sizes.values() if size), None)
            panels[mup][part] = {width: math.log2(size / first) if size else None for width, size in sizes.items()}
    return _panels(
        panels,
        "change of activations since step 0, relative to the narrowest width",
        "width",
        y_name=lambda octave: f"{2**octave:g}\N{MULTIPLICATION SIGN}",
        span=(-1.0, 2.0),
        notes={mup: _missing(results, mup) for mup in LABELS},
    )


def draw_transfer(results: Sequence[figures.Result]) -> str:
    """Loss at the end by learning rate, a line a width, the best of each marked; lines to what is far above are cut."""
    found = {mup: figures.losses(results, mup) for mup in LABELS}
    losses = sorted(one["loss"] for one in results if one["kind"] == "transfer" and one["loss"] is not None)
    best = [best.loss for mup in LABELS for best in figures.best_rates(results, mup).values()]
    notes = {}
    for mup, by_width in found.items():
        gone = [f"{width} at {rate:g}" for width, curve in by_width.items() for rate in curve if curve[rate] is None]
        notes[mup] = f"diverged: width {', '.join(gone)}" if gone else ""
    return _panels(
        {mup: {f"width {width}": curve for width, curve in by_width.items()} for mup, by_width in found.items()},
        "loss, mean of the last tenth of the steps, nats a token; the best rate is marked",
        "peak learning rate",
        span=(losses[0], max(losses[int(SHOWN * (len(losses) - 1))], *best)) if losses else (0.0, 1.0),
        notes=notes,
        mark_least=True,
    )


def _missing(results: Sequence[figures.Result], mup: bool) -> str:
    """Which widths have diverged, and which activations have not moved, in words; empty if none."""
    gone, still = figures.diverged(results, mup), figures.unmoved(results, mup)
    said = [f"diverged: width {', '.join(map(str, gone))}"] if gone else []
    return "; ".join([*said, f"no change at all: {', '.join(still)}"] if still else said)


def _panels(
    panels: Mapping[bool, Mapping[str, Curve]],
    title: str,
    x_name: str,
    span: tuple[float, float],
    notes: Mapping[bool, str],
    y_name: Any = lambda value: f"{value:.4g}",
    mark_least: bool = False,
) -> str:
    """Two plots side by side, on the same axes; x is drawn by its logarithm.

    `span`: what y spans. With `mark_least` lines are cut there; without, it is the least, and y spans all there is.
    """
    curves = [curve for panel in panels.values() for curve in panel.values()]
    xs = sorted({x for curve in curves for x in curve})
    ys = [*span] if mark_least else [*span, *(y for curve in curves for y in curve.values() if y is not None)]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.5
    octaves = round(1000 * math.log2(xs[-1] / xs[0]))
    frame = Frame(_WIDTH, _HEIGHT, _TOP, 46, octaves, low - margin, high + margin, right=24)
    place = f'x="{frame.left}" y="{frame.top}" width="{frame.width - frame.left}" height="{frame.floor - frame.top}"'
    drawn = []
    for index, (mup, panel) in enumerate(panels.items()):
        body = "".join((*_axes(frame, xs, x_name, y_name), *_curves(frame, panel, xs[0], mark_least)))
        name = {True: "With muP", False: "Standard parametrisation"}[mup]
        heading = f'<text class="name" x="{frame.left}" y="16">{name}</text>'
        heading += f'<text x="{frame.left}" y="32">{text(title)}</text>'
        body += f'<text class="note" x="{frame.left + 6}" y="{frame.floor - 8}">{text(notes[mup])}</text>'
        drawn.append(f'<g transform="translate({index * _WIDTH},0)">{heading}{_legend(frame, list(panel))}{body}</g>')
    size = f'viewBox="0 0 {2 * _WIDTH} {_HEIGHT}" width="{2 * _WIDTH}" height="{_HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{text(title)}" {size}>'
        f'{_DRAWING_STYLE}<clipPath id="plot"><rect {place}/></clipPath>{"".join(drawn)}</svg>\n'
    )


def _axes(frame: Frame, xs: Sequence[float], x_name: str, y_name: Any) -> list[str]:
    parts = []
    for tick in chart.nice_ticks(frame.low, frame.high, 6):
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{frame.left},{y:.1f}H{frame.width - frame.right}"/>')
        parts.append(f'<text text-anchor="end" x="{frame.left - 6}" y="{y + 4:.1f}">{text(y_name(tick))}</text>')
    parts.append(f'<path class="axis" d="M{frame.left},{frame.floor}H{frame.width - frame.right}"/>')
    for x in xs:
        place = _x(frame, x, xs[0])
        parts.append(f'<path class="axis" d="M{place:.1f},{frame.floor}v4"/>')
        parts.append(f'<text text-anchor="middle" x="{place:.1f}" y="{frame.floor + 18}">{x:g}</text>')
    middle = (frame.left + frame.width - frame.right) / 2
    return [*parts, f'<text text-anchor="middle" x="{middle:.1f}" y="{frame.floor + 36}">{text(x_name)}</text>']


def _curves(frame: Frame, panel: Mapping[str, Curve], first: float, mark_least: bool) -> list[str]:
    lines, marks = [], []
    for index, (name, curve) in enumerate(panel.items()):
        known = {x: y for x, y in curve.items() if y is not None}
        least = min(known, key=lambda x: known[x], default=None)
        path, pen = "", "M"
        for x, y in curve.items():
            path += f"{pen}{_x(frame, x, first):.1f},{_y(frame, y):.1f}" if y is not None else ""
            pen = "M" if y is None else "L"
        lines.append(f'<path class="line {_tone(index)}" clip-path="url(#plot)" d="{path}"/>')
        for x, y in known.items():
            if y > frame.high:
                continue
            place = _x(frame, x, first), _y(frame, y)
            title = f"<title>{text(name)}, {x:g}: {y:.4g}</title>"
            if x == least or not mark_least:
                marks.append(f"<path {chart.mark(index, _tone(index), *place)}>{title}</path>")
            else:
                where = f'cx="{place[0]:.1f}" cy="{place[1]:.1f}"'
                marks.append(f'<circle class="dot {_tone(index)}" {where} r="2.5">{title}</circle>')
    return lines + marks


def _x(frame: Frame, x: float, first: float) -> float:
    return frame.x(1000 * math.log2(x / first))


def _y(frame: Frame, y: float) -> float:
    """As `frame.y`, but above the plot for what lies there."""
    return frame.floor - (frame.floor - frame.top) * (y - frame.low) / (frame.high - frame.low)


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


def _signed(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:+.2f}"
