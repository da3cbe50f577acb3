"""The report's drawings, as inline SVG text: loss and learning rate over tokens, and stacked bars.

Takes what `history` read and gives strings to `html`. Colours are CSS classes, in STYLE, for light and dark. Every
curve is thinned to a fixed number of points, so a drawing of 300,000 steps is no larger than one of 2,000.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from crystal_hpc.config.units import format_count, format_seconds
from crystal_hpc.report.history import History
from crystal_hpc.report.records import Attempt, PlannedPhase, Step

RAW_POINTS = 2000
TONES = 8
"""Colours of the palette: classes t0 to t7, then `rest`."""
STYLE = """
.t0{--t:#2a78d6}.t1{--t:#1baf7a}.t2{--t:#eda100}.t3{--t:#008300}.t4{--t:#4a3aa7}.t5{--t:#e34948}.t6{--t:#e87ba4}
.t7{--t:#eb6834}.rest{--t:var(--rest)}.done{--t:var(--main)}.todo{--t:var(--rule)}
@media (prefers-color-scheme:dark){
.t0{--t:#3987e5}.t1{--t:#199e70}.t2{--t:#c98500}.t3{--t:#2f9a2f}.t4{--t:#9085e9}.t5{--t:#e66767}.t6{--t:#d55181}
.t7{--t:#d95926}}
.bar{display:block;margin-bottom:10px;border-radius:3px}
.chart{display:block;width:100%;height:auto}
.chart text{font-size:11px;fill:var(--faint)}.chart .name{font-size:12.5px;font-weight:600;fill:var(--ink)}
.chart .stop text{fill:var(--soft);paint-order:stroke;stroke:var(--page);stroke-width:3px}
.raw{fill:none;stroke:var(--raw);stroke-width:2.6;stroke-linecap:round;stroke-opacity:.45}
.few{stroke-width:4.5}
.smooth{fill:none;stroke:var(--main);stroke-width:2;stroke-linejoin:round}
.grid{stroke:var(--rule);stroke-width:1}.axis,.edge{stroke:var(--faint);stroke-width:1}
.band0{fill:var(--band)}.band1{fill:none;pointer-events:all}
.stop path{stroke:currentColor;stroke-opacity:.7;stroke-width:1;stroke-dasharray:3 3;fill:none}
.strip{fill:transparent}.strip:hover{fill:var(--ink);fill-opacity:.12}
.mark{fill:var(--t);stroke:var(--page);stroke-width:1.5}.tone{fill:var(--t);stroke:var(--page);stroke-width:1.5}
"""
_LETTER = 6.5  # width of a letter of the chart's 11 px type, generously
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value: object) -> str:
    """Any text made harmless in HTML and XML: escaped, and without the characters that XML forbids."""
    return escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def duration(seconds: float | None) -> str:
    """Seconds in words, and a dash for none."""
    known = seconds is not None and math.isfinite(seconds)
    return format_seconds(max(seconds or 0.0, 0.0)) if known else "\N{EN DASH}"


@dataclass(frozen=True)
class Frame:
    """A plot's place in its drawing (pixels) and what its axes span (tokens; values)."""

    width: int
    height: int
    top: int
    bottom: int
    tokens: int
    low: float
    high: float
    left: int = 58
    right: int = 14

    @property
    def floor(self) -> int:
        """Height of the x axis, from the top."""
        return self.height - self.bottom

    def x(self, tokens: float) -> float:
        """Pixels from the left of a number of tokens."""
        return self.left + (self.width - self.left - self.right) * tokens / max(self.tokens, 1)

    def y(self, value: float) -> float:
        """Pixels from the top of a value; one beyond the plot is drawn at its edge."""
        share = (value - self.low) / (self.high - self.low)
        return self.floor - (self.floor - self.top) * min(max(share, 0), 1)


def loss_chart(history: History, width: int) -> str:
    """Loss of every step and its running mean, phases, interruptions and held-out losses; empty without steps."""
    if not history.steps:
        return ""
    smooth = dict(zip(map(id, history.steps), running_mean(history.steps), strict=True))
    low, high = loss_range(history)
    frame = Frame(width, 430 if width > 600 else 340, 76, 46, history.tokens, low, high)
    limit = RAW_POINTS if width > 600 else RAW_POINTS // 4
    shown = thin(history.steps, lambda step: step.loss, limit)
    every = [*history.steps[:: -(-len(history.steps) // limit)], history.steps[-1]]
    parts = [
        *_bands(history, frame),
        *_value_axis(frame, nice_ticks(frame.low, frame.high, 6)),
        *_token_axis(history, frame),
        f'<path class="raw{" few" if len(shown) < 300 else ""}" d="{_dots(frame, shown)}"/>',
        f'<path class="smooth" d="{_line(frame, every, lambda step: smooth[id(step)])}"/>',
        *_strips(history, frame, smooth),
        *_interruptions(history, frame),
        *_held_out(history, frame),
    ]
    return _svg(frame, "Loss by tokens seen", parts)


def rate_chart(history: History, width: int) -> str:
    """Learning rate on the x axis of the loss chart; empty without steps."""
    rates = [step.rate for step in history.steps if math.isfinite(step.rate)]
    if not rates:
        return ""
    high = max(rates) * 1.05
    frame = Frame(width, 150, 8, 28, history.tokens, 0.0, high if high > 0 else 1.0)
    shown = thin(history.steps, lambda step: step.rate, RAW_POINTS // (2 if width > 600 else 8))
    parts = [
        *_bands(history, frame, names=False),
        *_value_axis(frame, nice_ticks(0, frame.high, 3)),
        *_token_axis(history, frame, steps=False),
        f'<path class="smooth" d="{_line(frame, shown, lambda step: step.rate)}"/>',
        *_strips(history, frame, {}),
    ]
    return _svg(frame, "Learning rate by tokens seen", parts)


def stacked_bar(parts: Sequence[tuple[str, float, str]], label: str) -> str:
    """One full-width bar of (name for the tooltip, amount, CSS class); empty where there is nothing to share out."""
    total = math.fsum(amount for _, amount, _ in parts)
    if not 0 < total < math.inf:
        return ""
    rects, start = [], 0.0
    for name, amount, tone in parts:
        share = 100 * amount / total
        if share > 0:
            title = f"<title>{text(name)}: {share:.1f} %</title>"
            rects.append(f'<rect class="tone {tone}" x="{start:.3f}%" width="{share:.3f}%" height="22">{title}</rect>')
        start += share
    return f'<svg class="bar" role="img" aria-label="{text(label)}" width="100%" height="22">{"".join(rects)}</svg>'


def tones(history: History) -> dict[str, str]:
    """CSS class by name of source, training or held out: the largest part of any mixture is first in the palette."""
    shares: dict[str, float] = {}
    for phase in history.phases:
        for name, share in phase.sources.items():
            shares[name] = max(share.tokens / max(phase.tokens, 1), shares.get(name, 0.0))
    names = dict.fromkeys([*sorted(shares, key=lambda name: -shares[name]), *history.stores, *held_out_names(history)])
    return {name: f"t{index}" if index < TONES else "rest" for index, name in enumerate(names)}


def mark(index: int, tone: str, x: float = 7, y: float = 7) -> str:
    """Attributes of the marker of the held-out source with this index; four shapes help where colours do not."""
    shapes = (
        "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
        "M-4,-4h8v8h-8z",
        "M0,-5.5l5.5,5.5l-5.5,5.5l-5.5,-5.5z",
        "M0,-5l5,9h-10z",
    )
    return f'class="mark {tone}" transform="translate({x:.1f},{y:.1f})" d="{shapes[index % len(shapes)]}"'


def grade(attempt: Attempt) -> str:
    """CSS class of an ending: `good`, `fair` (the cluster's routine) or `bad`."""
    return {"finished": "good", "preempted": "fair", "time_limit": "fair"}.get(attempt.outcome or "", "bad")


def mean_window(steps: int) -> int:
    """Steps that the running mean of a run of that many steps takes together."""
    return 2 * max(steps // 200, 2) + 1


def running_mean(steps: Sequence[Step]) -> list[float]:
    """Mean of the losses around each step, narrower towards the ends of a phase; not-a-number where a loss is."""
    reach, means = mean_window(len(steps)) // 2, []
    for _, phase in itertools.groupby(steps, key=lambda step: step.phase):
        losses = [step.loss for step in phase]
        finite = [math.isfinite(loss) for loss in losses]
        sums = [0.0, *itertools.accumulate(loss if fine else 0.0 for loss, fine in zip(losses, finite, strict=True))]
        counts = [0, *itertools.accumulate(finite)]
        for index, fine in enumerate(finite):
            half = min(reach, index, len(losses) - 1 - index)
            low, high = index - half, index + half + 1
            means.append((sums[high] - sums[low]) / (counts[high] - counts[low]) if fine else math.nan)
    return means


def loss_range(history: History) -> tuple[float, float]:
    """The losses that the chart spans. The steepest 1 % at the top is cut off where it would flatten all the rest."""
    losses = sorted(step.loss for step in history.steps if math.isfinite(step.loss))
    held_out = [loss for found in history.evaluations for loss in found.losses.values() if math.isfinite(loss)]
    if not losses:
        losses = sorted(held_out) or [0.0, 1.0]
    low = min([losses[0], *held_out])
    most = max([losses[int(0.99 * (len(losses) - 1))], *held_out])
    high = max(losses[-1], most) if losses[-1] - low < 1.6 * (most - low) else most
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def thin(steps: Sequence[Step], value: Callable[[Step], float], limit: int) -> list[Step]:
    """At most about `limit` steps: evenly spread ones, and the lowest and highest of each stretch, so peaks stay."""
    if len(steps) <= limit:
        return list(steps)
    chosen = set(range(0, len(steps), -(-5 * len(steps) // (4 * limit)))) | {len(steps) - 1}
    size = -(-20 * len(steps) // limit)
    for start in range(0, len(steps), size):
        finite = [i for i in range(start, min(start + size, len(steps))) if math.isfinite(value(steps[i]))]
        if finite:
            chosen |= {min(finite, key=lambda i: value(steps[i])), max(finite, key=lambda i: value(steps[i]))}
    return [steps[index] for index in sorted(chosen)]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two values."""
    rough = (high - low) / max(count, 1)
    if not 0 < rough < math.inf:
        return [low]
    base = 10 ** math.floor(math.log10(rough))
    size = next(size for size in (base, 2 * base, 5 * base, 10 * base) if size >= rough * 0.999)
    return [tick * size for tick in range(math.ceil(low / size), math.floor(high / size) + 1)]


def interruptions(history: History) -> Iterator[tuple[Attempt, int]]:
    """Attempts that ended before the work was done, and the tokens at which they did."""
    phases = {phase.name: phase for phase in history.phases}
    latest: dict[int, int] = {}
    for step in (*history.redone, *history.steps):
        latest[step.attempt] = max(step.tokens, latest.get(step.attempt, 0))
    stood = 0
    for attempt in history.attempts:
        place = attempt.last_step or attempt.first_step
        if attempt.number in latest:
            stood = latest[attempt.number]
        elif place and place.phase in phases:
            stood = phases[place.phase].tokens_at(place.step)
        over = attempt.outcome or (attempt is not history.attempts[-1] and "not recorded")
        if over and over != "finished":
            yield attempt, stood


def _svg(frame: Frame, label: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {frame.width} {frame.height}" width="{frame.width}" height="{frame.height}"'
    return f'<svg class="chart" role="img" aria-label="{text(label)}" {size}>{"".join(parts)}</svg>'


def _reached(history: History) -> Iterator[tuple[PlannedPhase, int, int]]:
    """The phases begun, each with the tokens at which it starts and at which it ends or stands."""
    for phase in history.phases:
        if done := history.steps_done(phase):
            yield phase, phase.start, min(phase.tokens_at(done), history.tokens)


def _bands(history: History, frame: Frame, names: bool = True) -> Iterator[str]:
    for index, (phase, start, end) in enumerate(_reached(history)):
        left, wide = frame.x(start), frame.x(end) - frame.x(start)
        top = 0 if names else frame.top
        title = f"<title>{text(phase.name)}: {history.steps_done(phase):,} of {phase.steps:,} steps</title>"
        size = f'x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{frame.floor - top}"'
        yield f'<rect class="band{index % 2}" {size}>{title}</rect>'
        if index:
            yield f'<path class="edge" d="M{left:.1f},{top}V{frame.floor}"/>'
        fits = int((wide - 10) / (_LETTER * 1.15))
        name = phase.name if len(phase.name) <= fits else f"{phase.name[: fits - 1]}\N{HORIZONTAL ELLIPSIS}"
        if names and fits > 2:
            yield f'<text class="name" x="{left + 6:.1f}" y="17">{text(name)}{title}</text>'


def _value_axis(frame: Frame, ticks: Sequence[float]) -> Iterator[str]:
    for tick in ticks:
        y = frame.y(tick)
        yield f'<path class="grid" d="M{frame.left},{y:.1f}H{frame.width - frame.right}"/>'
        yield f'<text class="tick" text-anchor="end" x="{frame.left - 6}" y="{y + 4:.1f}">{tick:.4g}</text>'


def _token_axis(history: History, frame: Frame, steps: bool = True) -> Iterator[str]:
    """Tokens of the run in one row and, below, steps of each phase."""
    yield f'<path class="axis" d="M{frame.left},{frame.floor}H{frame.width - frame.right}"/>'
    yield f'<text class="head" text-anchor="end" x="{frame.left - 14}" y="{frame.floor + 18}">tokens</text>'
    for tick in nice_ticks(0, frame.tokens, frame.width // 110):
        yield _tick(frame, tick, frame.floor + 18, format_count(tick))
        yield f'<path class="axis" d="M{frame.x(tick):.1f},{frame.floor}v4"/>'
    if not steps:
        return
    yield f'<text class="head" text-anchor="end" x="{frame.left - 14}" y="{frame.floor + 36}">step</text>'
    free = 0.0
    for phase, start, end in _reached(history):
        wide, done = frame.x(end) - frame.x(start), history.steps_done(phase)
        for step in nice_ticks(0, done, max(int(wide / 90), 1)):
            x, said = frame.x(phase.tokens_at(round(step))), f"{step:,.0f}"
            half = len(said) * _LETTER / 2
            if step == round(step) and x - half > free and x + half < frame.width:
                free = x + half + 14
                yield _tick(frame, phase.tokens_at(round(step)), frame.floor + 36, said)


def _tick(frame: Frame, tokens: float, y: int, said: str) -> str:
    anchor = "end" if frame.x(tokens) + len(said) * _LETTER / 2 > frame.width else "middle"
    return f'<text class="tick" text-anchor="{anchor}" x="{frame.x(tokens):.1f}" y="{y}">{text(said)}</text>'


def _dots(frame: Frame, steps: Sequence[Step]) -> str:
    return "".join(
        f"M{frame.x(step.tokens):.1f},{frame.y(step.loss):.1f}h0" for step in steps if math.isfinite(step.loss)
    )


def _line(frame: Frame, steps: Sequence[Step], value: Callable[[Step], float]) -> str:
    """A path that breaks where a phase begins and where the value is not finite or above the plot."""
    path, phase = [], ""
    for step in steps:
        if not value(step) <= frame.high:
            phase = ""
            continue
        path.append(f"{'L' if step.phase == phase else 'M'}{frame.x(step.tokens):.1f},{frame.y(value(step)):.1f}")
        phase = step.phase
    return "".join(path)


def _strips(history: History, frame: Frame, smooth: dict[int, float]) -> Iterator[str]:
    """Invisible upright strips over the plot, each with a tooltip on its last step."""
    count = frame.width // 5
    size = -(-len(history.steps) // count)
    left = frame.x(0)
    for end in range(size, len(history.steps) + size, size):
        step = history.steps[min(end, len(history.steps)) - 1]
        right = frame.x(step.tokens)
        mean = f" (smoothed {smooth[id(step)]:.4g})" if smooth else ""
        said = (
            f"{step.phase}, step {step.step:,} ({format_count(step.tokens)} tokens)\nloss {step.loss:.4g}{mean}\n"
            f"learning rate {step.rate:.3g}, gradient norm {step.grad_norm:.3g}\n"
            f"attempt {step.attempt}, step took {duration(step.seconds)}"
        )
        place = f'x="{left:.1f}" y="{frame.top}" width="{max(right - left, 0.5):.1f}"'
        yield f'<rect class="strip" {place} height="{frame.floor - frame.top}"><title>{text(said)}</title></rect>'
        left = right


def _interruptions(history: History, frame: Frame) -> Iterator[str]:
    """An upright line for each, labelled in one of three rows as long as there is room."""
    free = [0.0, 0.0, 0.0]
    for attempt, tokens in sorted(interruptions(history), key=lambda found: found[1]):
        x = frame.x(min(tokens, frame.tokens))
        said = attempt.ending + (f", step {attempt.last_step.step:,}" if attempt.last_step else "")
        wide = len(said) * _LETTER
        left = min(x + 4, frame.width - wide)
        row = next((row for row, right in enumerate(free) if left > right), None)
        top, label = frame.top - 6, ""
        if row is not None:
            free[row], top = left + wide + 14, 26 + 16 * row
            label = f'<text x="{left:.1f}" y="{top + 10}">{text(said)}</text>'
        place = attempt.last_step or "an unknown step"
        title = text(f"attempt {attempt.number}: {attempt.ending} at {place}\n{attempt.reason}")
        line = f'<path d="M{x:.1f},{top}V{frame.floor}"/>'
        yield f'<g class="stop {grade(attempt)}"><title>{title}</title>{line}{label}</g>'


def _held_out(history: History, frame: Frame) -> Iterator[str]:
    names, colours = held_out_names(history), tones(history)
    for found in history.evaluations:
        for name, loss in found.losses.items():
            if math.isfinite(loss):
                said = text(f"held out, {name}: {loss:.4g} nats a token\nafter {found.phase}, step {found.step:,}")
                x, y = frame.x(min(found.tokens, frame.tokens)), frame.y(loss)
                place = mark(names.index(name), colours[name], x, y)
                yield f"<path {place}><title>{said}</title></path>"


def held_out_names(history: History) -> list[str]:
    """The held-out sources that were evaluated, in the order of the config."""
    found = dict.fromkeys(name for found in history.evaluations for name in found.losses)
    return sorted(found, key=lambda name: ([*history.run.data.held_out, *found]).index(name))
