"""What a run will consume, before anything runs: steps, tokens, and epochs of each source in each phase.

All of it is arithmetic on the config and the sizes of the stores (`data.order`), so it needs no torch and a fraction of
a second, on a login node. `crystal submit` keeps it as plan.json: the run's data as it stood when the run began.
Of a store that is not there yet only the size is unknown, and with it epochs and repeats.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Phase, Run
from crystal_hpc.config.units import format_count
from crystal_hpc.data.catalog import StoreInfo
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.sources import Sources

WIDTH = 100  # of the text, in columns
Planned = dict[str, Any]


def make_plan(run: Run, sources: Sources) -> dict[str, Any]:
    """The content of plan.json; what depends on the size of a store that is not among `sources` is None."""
    epochs: dict[str, float | None] = {name: 0.0 if name in sources.training else None for name in run.data.sources}
    orders = run_orders(run, dict.fromkeys(run.data.sources, 0) | sources.tokens)
    phases = [_phase(phase, order, epochs) for phase, order in zip(run.phases, orders, strict=True)]
    return {
        "run": run.name,
        "digest": derive.run_digest(run),
        "tokenizer": sources.tokenizer,
        "parameters": derive.parameters(run.model),
        "tokens": derive.total_tokens(run),
        "sources": {
            name: _store(folder, sources.training.get(name)) | {"epochs": epochs[name]}
            for name, folder in run.data.sources.items()
        },
        "phases": phases,
    }


def _store(folder: str, info: StoreInfo | None) -> Planned:
    tokens, digest = (info.tokens, info.digest) if info else (None, None)
    return {"store": str(Path(folder)), "tokens": tokens, "digest": digest}


def _phase(phase: Phase, order: PhaseOrder, epochs: dict[str, float | None]) -> Planned:
    """One phase of the plan; moves `epochs`, how often the run has read each source so far, to the phase's end."""
    samples = derive.phase_samples(phase)
    used = {}
    for k, (name, count) in enumerate(order.consumed(samples).items()):
        before, read, repeat, repeated = epochs[name], None, None, 0
        if order.rows[k]:
            read = count / order.rows[k]
            repeat = order.first_repeat(name, samples)
            repeated = max(0, order.start[k] + count - max(order.start[k], order.rows[k]))
        epochs[name] = None if before is None or read is None else before + read
        used[name] = {
            "samples": count,
            "tokens": count * phase.sequence_length,
            "epochs": read,
            # Whatever the sequence length: the text is the same.
            "epochs_before": before,
            "epochs_after": epochs[name],
            # Of rows that this order gave before: counted anew for another sequence length.
            "first_repeat_step": None if repeat is None else repeat // phase.batch_size,
            "repeated_samples": repeated,
        }
    return {
        "name": phase.name,
        "sequence_length": phase.sequence_length,
        "steps": derive.phase_steps(phase),
        "tokens": derive.phase_tokens(phase),
        "samples": samples,
        "sources": used,
    }


def describe_plan(run: Run, plan: dict[str, Any]) -> str:
    """The plan as text: a line a phase, a line a source in it, the whole run, and what is worth knowing."""
    steps = sum(phase["steps"] for phase in plan["phases"])
    return "\n".join(
        [
            f"{run.name}: {format_count(plan['parameters'])} parameters, {format_count(plan['tokens'])} tokens, "
            f"{steps:,} steps in {len(plan['phases'])} phases",
            *_table(plan),
            *_notes(plan),
        ]
    )


def _table(plan: dict[str, Any]) -> Iterator[str]:
    """`so far` is how often the run has read a source by the phase's end, `repeats from` a step of the phase."""
    names = [name for phase in plan["phases"] for name in (phase["name"], *phase["sources"])]
    wide = max(16, *map(len, names)) + 2
    yield _line(wide, "phase / source", "steps", "tokens", "share", "epochs", "so far", "repeats from")
    for phase in plan["phases"]:
        yield _line(wide, phase["name"], f"{phase['steps']:,}", format_count(phase["tokens"]))
        for name, used in phase["sources"].items():
            first, share = used["first_repeat_step"], _share(used["tokens"], phase["tokens"])
            epochs = _epochs(used["epochs"]), _epochs(used["epochs_after"])
            repeats = "" if first is None else f"step {first:,}"
            yield _line(wide, f"  {name}", "", format_count(used["tokens"]), share, *epochs, repeats)
    yield _line(wide, "whole run", "", format_count(plan["tokens"]), "", "", "", "in store")
    for name, source in plan["sources"].items():
        tokens = sum(phase["sources"].get(name, {}).get("tokens", 0) for phase in plan["phases"])
        cells = format_count(tokens), _share(tokens, plan["tokens"]), _epochs(source["epochs"])
        size = "missing" if source["tokens"] is None else format_count(source["tokens"])
        yield _line(wide, f"  {name}", "", *cells, "", size)


def _line(wide: int, name: str, *cells: str) -> str:
    line = f"{name:<{wide}}"
    for cell, width in zip(cells, (9, 9, 9, 9, 9, 15), strict=False):
        line += f"{cell:>{width}}"
    return line.rstrip()


def _notes(plan: dict[str, Any]) -> Iterator[str]:
    """What of the table is easily overlooked."""
    seen: dict[str, set[int]] = {}  # the sequence lengths in which each source has been read
    for phase in plan["phases"]:
        length = phase["sequence_length"]
        anew = [name for name in phase["sources"] if name in seen and length not in seen[name]]
        if anew:
            yield from note(
                f"{phase['name']}: rows of {length:,} tokens have an order of their own, so what was read before is "
                f"read anew, and repeats count from here: {', '.join(anew)}"
            )
        for name, used in phase["sources"].items():
            seen.setdefault(name, set()).add(length)
            if used["repeated_samples"]:
                unread = used["epochs"] * (1 - used["repeated_samples"] / used["samples"])
                yield from note(
                    f"{phase['name']}: {name} runs dry at step {used['first_repeat_step']:,} of {phase['steps']:,}: "
                    f"{used['epochs']:.2f} epochs wanted, {unread:.2f} unread"
                )
    repeated = sum(
        used["repeated_samples"] * phase["sequence_length"]
        for phase in plan["phases"]
        for used in phase["sources"].values()
    )
    if repeated:
        share = _share(repeated, plan["tokens"])
        yield from note(f"whole run: {format_count(repeated)} tokens ({share}) are in rows read before")


def _epochs(count: float | None) -> str:
    return "?" if count is None else f"{count:.2f}"


def _share(part: int, whole: int) -> str:
    share = part / whole
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.4%}"


def note(text: str) -> list[str]:
    """What is easily overlooked, as lines of the plan's text."""
    return textwrap.wrap(text, WIDTH, initial_indent="note  ", subsequent_indent="      ", break_on_hyphens=False)
