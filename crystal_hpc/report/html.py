"""`crystal report`: one self-contained page on what a run did, read from its folder.

The last stop of a job's journey. `history` reads, `chart` draws, this module words and lays out. The page needs no
network, no script and no font; it follows the reader's light or dark setting and prints. Everything that comes from
the run folder is escaped, and a policy in the page forbids scripts besides.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.units import format_bytes, format_count
from crystal_hpc.report import chart
from crystal_hpc.report.chart import duration, text
from crystal_hpc.report.history import History, last_signs, read_history, state, time_spent, when
from crystal_hpc.report.page import STYLE
from crystal_hpc.report.records import Attempt, PlannedPhase
from crystal_hpc.report.speed import HEADS as SPEED
from crystal_hpc.report.speed import speed_rows

_WIDE, _NARROW = 1080, 372  # pixels: the page at its widest, and a phone
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_DASH = "\N{EN DASH}"


class _Markup(str):
    """Text that is HTML already; a table escapes everything else."""


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path.

    Raises RunError if the folder is no run folder, ConfigError if its run.yaml is damaged, DiskError if the page cannot
    be written.
    """
    history = read_history(Path(run_folder))
    path = history.folder / "report.html"
    files.write_file(path, render(history, datetime.now(UTC)))
    return path


def render(history: History, now: datetime) -> str:
    """The page as text; `now` is the time it says it was written."""
    name = text(history.run.name)
    sections = (_head, _curves, _sources, _evaluations, _attempts, _time, _speed, _checkpoints, _provenance)
    body = "\n".join("".join(section(history)) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: run report</title>\n<style>{chart.STYLE}{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written {now:%Y-%m-%d %H:%M} UTC from {text(history.folder.name)}. Times are UTC; steps are counted "
        "from 0 in each phase.</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(history: History) -> Iterator[str]:
    planned_steps, done = sum(phase.steps for phase in history.phases), sum(map(history.steps_done, history.phases))
    planned_tokens = history.phases[-1].start + history.phases[-1].tokens if history.phases else 0
    spent = time_spent(history)
    wall, trained = math.fsum(spent.values()), spent.get("training", 0.0) + spent.get("data wait", 0.0)
    tokens = history.tokens
    tiles = [
        ("Tokens", format_count(history.tokens), f"of {format_count(planned_tokens)} planned"),
        ("Steps", f"{done:,}", f"of {planned_steps:,}, in {_plural(len(history.phases), 'phase')}"),
        ("Parameters", format_count(derive.parameters(history.run.model)), f"{derive.parameters(history.run.model):,}"),
        ("Wall time", duration(wall or None), f"over {_plural(len(history.attempts), 'attempt')}"),
        (
            "Mean tokens a second",
            format_count(tokens / wall) if wall and tokens else _DASH,
            f"of wall time; {format_count(tokens / trained)} in training" if trained and tokens else "",
        ),
    ]
    yield f'<header><p class="kicker">Run report</p><h1>{text(history.run.name)}</h1>'
    yield f'<p class="state">{text(state(history))}</p>'
    yield from _progress(history)
    yield '<dl class="tiles">'
    yield from (f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in tiles)
    yield "</dl></header>"
    yield from (f'<p class="note">{text(note)}.</p>' for note in history.notes)


def _progress(history: History) -> Iterator[str]:
    """A bar of all phases, filled as far as the run has come."""
    parts: list[tuple[str, float, str]] = []
    for phase in history.phases:
        done = history.tokens and phase.tokens_at(history.steps_done(phase)) - phase.start
        parts += [(f"{phase.name}, done", done, "done"), (f"{phase.name}, to do", phase.tokens - done, "todo")]
    if not history.complete:
        yield chart.stacked_bar(parts, "Share of the plan that is done")


def _curves(history: History) -> Iterator[str]:
    yield "<section><h2>Loss and learning rate</h2>"
    if not history.steps:
        yield "<p>No step has been done yet.</p></section>"
        return
    window = chart.mean_window(len(history.steps))
    raw = _key('<path class="raw" d="M3,9h0M7,5h0M11,8h0"/>')
    smooth = _key('<path class="smooth" d="M0,7H14"/>')
    yield f'<ul class="legend"><li>{raw}training loss of {_sampled(history)}, nats a token</li>'
    yield f"<li>{smooth}its mean over about {window:,} steps, anew in each phase</li>"
    kinds = {chart.grade(attempt) for attempt, _ in chart.interruptions(history)}
    for kind, said in (("fair", "preempted or out of time"), ("bad", "failed or cancelled")):
        if kind in kinds:
            stop = _key(f'<g class="stop {kind}"><path d="M7,0V14"/></g>')
            yield f"<li>{stop}{said}</li>"
    tones = chart.tones(history)
    for index, name in enumerate(chart.held_out_names(history)):
        yield f"<li>{_key(f'<path {chart.mark(index, tones[name])}/>')}held out: {text(name)}</li>"
    yield "</ul>"
    yield from (f'<p class="note">{text(note)}</p>' for note in _loss_notes(history))
    for kind, width in (("wide", _WIDE), ("narrow", _NARROW)):
        yield f'<div class="{kind}">{chart.loss_chart(history, width)}<h3>Learning rate</h3>'
        yield f"{chart.rate_chart(history, width)}</div>"
    yield "</section>"


def _key(drawing: str) -> str:
    return f'<svg class="key" viewBox="0 0 14 14">{drawing}</svg>'


def _sampled(history: History) -> str:
    whole = len(history.steps) <= chart.RAW_POINTS // 4
    return "each step" if whole else "sampled steps and the extremes of each stretch"


def _loss_notes(history: History) -> Iterator[str]:
    odd = [step for step in history.steps if not math.isfinite(step.loss)]
    if odd:
        first = f"phase {odd[0].phase}, step {odd[0].step:,}"
        yield f"{_plural(len(odd), 'step')} had a loss that is not finite, the first in {first}: gaps in the curve."
    high = chart.loss_range(history)[1]
    above = [step.loss for step in history.steps if high < step.loss < math.inf]
    if above:
        said = f"{_plural(len(above), 'step')} with a loss above {high:.3g} (up to {max(above):.3g})"
        yield f"{said} drawn at the upper edge."


def _sources(history: History) -> Iterator[str]:
    done = {phase.name: min(history.steps_done(phase) / max(phase.steps, 1), 1.0) for phase in history.phases}
    totals = {name: sum(_used(phase, name, done) for phase in history.phases) for name in history.stores}
    order = sorted(totals, key=lambda name: -totals[name])
    tones = chart.tones(history)
    yield "<section><h2>Tokens by source and phase</h2>"
    yield from (f'<p class="note">{text(note)}</p>' for note in _share_notes(history, done))
    for phase in history.phases:
        used = [(name, _used(phase, name, done), tones[name]) for name in order if name in phase.sources]
        amount = format_count(math.fsum(tokens for _, tokens, _ in used))
        yield f'<p class="barname"><b>{text(phase.name)}</b> {amount} tokens</p>'
        yield chart.stacked_bar(used, f"Share of each source in {phase.name}") or '<p class="faint">not begun</p>'
    rows = []
    for name in order:
        takers = [phase for phase in history.phases if name in phase.sources]
        epochs = math.fsum(phase.sources[name].epochs * done[phase.name] for phase in takers)
        cells = [_share_cell(phase, name, done) for phase in history.phases]
        rows.append([_swatch(tones[name], name), *cells, _count(totals[name]), f"{epochs:.3g}"])
    total = [_count(sum(_used(phase, name, done) for name in phase.sources)) for phase in history.phases]
    rows.append(["all", *total, _count(sum(totals.values())), ""])
    yield _table(["source", *(phase.name for phase in history.phases), "total", "epochs"], rows)
    yield "</section>"


def _used(phase: PlannedPhase, source: str, done: dict[str, float]) -> float:
    return phase.sources[source].tokens * done[phase.name] if source in phase.sources else 0.0


def _share_cell(phase: PlannedPhase, source: str, done: dict[str, float]) -> str:
    if source not in phase.sources:
        return _DASH
    share = 100 * phase.sources[source].tokens / max(sum(found.tokens for found in phase.sources.values()), 1)
    return _Markup(f"{_count(_used(phase, source, done))} <small>{share:.1f}&#160;%</small>")


def _share_notes(history: History, done: dict[str, float]) -> Iterator[str]:
    for phase in history.phases:
        if 0 < done[phase.name] < 1:
            yield (
                f"Phase {phase.name} is in progress: its numbers are the plan's, scaled to the "
                f"{history.steps_done(phase):,} of {phase.steps:,} steps done."
            )


def _evaluations(history: History) -> Iterator[str]:
    yield "<section><h2>Held-out loss</h2>"
    if history.evaluations:
        names, tones = chart.held_out_names(history), chart.tones(history)
        rows = []
        for index, name in enumerate(names):
            key = _key(f"<path {chart.mark(index, tones[name])}/>")
            losses = [_loss_cell(found.losses.get(name)) for found in history.evaluations]
            rows.append([_Markup(f"<span class=one>{key}{text(name)}</span>"), *losses])
        heads = [f"after {found.phase} ({format_count(found.tokens)})" for found in history.evaluations]
        yield _table(["source", *heads], rows)
        yield '<p class="faint">Nats a token, with the perplexity of a token beside it.</p></section>'
    else:
        yield "<p>No evaluation has been done yet.</p></section>"


def _loss_cell(loss: float | None) -> str:
    if loss is None:
        return _DASH
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return _Markup(f"{loss:.4f} <small>{perplexity:,.4g}</small>")


def _attempts(history: History) -> Iterator[str]:
    yield "<section><h2>Attempts</h2>"
    if not history.attempts:
        yield "<p>No attempt has been recorded.</p></section>"
        return
    rows, ends = [], last_signs(history)
    for attempt in history.attempts:
        open_ended = "" if attempt.ended else "at least "
        rows.append(
            [
                str(attempt.number),
                _outcome_cell(attempt, attempt is history.attempts[-1]),
                attempt.job,
                when(attempt.started),
                open_ended + duration(ends[attempt.number] - attempt.started),
                _span(attempt),
                duration(attempt.signal_to_durable),
                f"{attempt.redone_steps:,}",
            ]
        )
    heads = ["attempt", "outcome", "job", "started", "lasted", "steps", "signal to durable", "steps redone"]
    yield _table(heads, rows, words=2)
    yield "</section>"


def _span(attempt: Attempt) -> str:
    """`code 3 to 17`, naming the phase once if it is one."""
    first, last = attempt.first_step, attempt.last_step
    end = f"{last.step:,}" if first and last and first.phase == last.phase else str(last or _DASH)
    return f"{first or _DASH} \N{RIGHTWARDS ARROW} {end}"


def _outcome_cell(attempt: Attempt, newest: bool) -> str:
    running = newest and attempt.outcome is None
    said, kind = ("running", "good") if running else (attempt.ending, chart.grade(attempt))
    signal = f" ({text(attempt.signal)})" if attempt.signal else ""
    outcome = f'<b class="one {kind}">{text(said)}</b>{signal}'
    return _Markup(f'<div class="outcome">{outcome} <span class="soft">{text(attempt.reason)}</span></div>')


def _time(history: History) -> Iterator[str]:
    spent = time_spent(history)
    if not spent:
        return
    yield "<section><h2>Where the time went</h2>"
    tones = dict(zip(spent, ("t0", "t1", "t5", "t2", "t4", "rest", "todo"), strict=True))
    yield chart.stacked_bar([(name, seconds, tones[name]) for name, seconds in spent.items()], "Share of the wall time")
    total = math.fsum(spent.values())
    rows = [
        [_swatch(tones[name], name), duration(seconds), f"{100 * seconds / total:.1f} %"]
        for name, seconds in spent.items()
        if seconds and total
    ]
    yield f'<div class="slim">{_table(["went into", "time", "share"], rows)}</div>'
    starts = [attempt.startup for attempt in history.attempts if attempt.startup]
    if starts:
        parts = dict.fromkeys(part for start in starts for part in start)
        means = {part: [start[part] for start in starts if part in start] for part in parts}
        said = ", ".join(f"{part.replace('_', ' ')} {duration(math.fsum(s) / len(s))}" for part, s in means.items())
        yield f'<p class="faint">A start on average: {text(said)}.</p>'
    yield "</section>"


def _speed(history: History) -> Iterator[str]:
    if rows := speed_rows(history):
        yield f"<section><h2>Speed</h2>{_table(SPEED, rows)}"
        yield '<p class="faint">Medians over the steps, and shares of their time on rank 0.</p></section>'


def _checkpoints(history: History) -> Iterator[str]:
    yield "<section><h2>Checkpoints and exports</h2>"
    waited = {(save.phase, save.step): duration(save.stood_still) for save in history.saves}
    rows = [
        [
            *(f"{found.phase} {found.step:,}", found.why, _count(found.tokens), format_bytes(found.bytes)),
            *(duration(found.seconds), waited.get((found.phase, found.step), _DASH)),
        ]
        for found in history.checkpoints
    ]
    if rows:
        yield _table(["steps done", "why", "tokens", "size", "saved in", "training stood still"], rows, words=2)
        if len(history.saves) > len(rows):
            still = duration(math.fsum(save.stood_still for save in history.saves))
            yield f"<p>Of {len(history.saves):,} made, for which training stood still {text(still)} in all.</p>"
    else:
        yield "<p>No complete checkpoint is kept.</p>"
    if history.exports:
        yield f"<p>Exports: {text(', '.join(history.exports))}.</p>"
    yield "</section>"


def _provenance(history: History) -> Iterator[str]:
    yield f"<section><h2>Provenance</h2><p>Plan digest <code>{text(history.digest)}</code>.</p>"
    stores = [[name, store.path, _code(store.digest), _count(store.tokens)] for name, store in history.stores.items()]
    yield _table(["source", "store", "digest", "tokens"], stores, words=3)
    groups: dict[tuple[str, ...], list[Attempt]] = {}
    for attempt in history.attempts:
        versions = ", ".join(f"{name} {version}" for name, version in attempt.versions.items())
        ranks = _DASH if attempt.ranks is None else str(attempt.ranks)
        groups.setdefault((attempt.commit or _DASH, attempt.backend or _DASH, ranks, versions), []).append(attempt)
    rows = [
        [_ranges([attempt.number for attempt in found]), _code(commit), backend, ranks, versions]
        for (commit, backend, ranks, versions), found in groups.items()
    ]
    if rows:
        yield _table(["attempts", "commit", "backend", "ranks", "versions"], rows, words=5)
    yield f"<details><summary>The resolved config</summary><pre>{text(history.run_yaml)}</pre></details></section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table; the first `words` columns are words, the rest numbers on the right. Escapes all but _Markup."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if index < words else ' class=n'}>{cell if isinstance(cell, _Markup) else text(cell)}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells(heads, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _count(tokens: float) -> str:
    return _Markup(f'<span title="{tokens:,.0f}">{format_count(tokens)}</span>')


def _swatch(tone: str, name: str) -> str:
    return _Markup(f'<span class=one><i class="swatch {tone}"></i>{text(name)}</span>')


def _code(value: str) -> str:
    return _Markup(f"<code>{text(value)}</code>")


def _plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}{_DASH}{last}" for first, last in spans)
