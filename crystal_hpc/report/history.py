"""A run folder as plain data: what was planned, every step that counts, every attempt, evaluation and checkpoint.

The report's first half: jobs and ranks write the folder, this module reads it (and never writes), `html` draws it. It
is a reader of evidence: a damaged or half-written record is left out and named in `notes`, never guessed at.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.errors import RunError
from crystal_hpc.report.records import (
    Attempt,
    Checkpoint,
    Evaluation,
    PlannedPhase,
    Position,
    Save,
    Share,
    Step,
    Store,
)
from crystal_hpc.train.generations import PRUNED

Record = TypeVar("Record")
MEASURED = ("forward_backward", "gradient_sync", "save_wait", "optimizer", "mfu")
# What reading a damaged record can raise, from a torn file to an infinite count.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


@dataclass
class History:
    """Everything a run folder tells. `steps` are those that count, in order; later attempts undid the `redone` ones."""

    folder: Path
    run: Run
    run_yaml: str
    digest: str
    stores: dict[str, Store]
    phases: list[PlannedPhase]
    steps: list[Step] = field(default_factory=list)
    redone: list[Step] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.steps[-1].tokens if self.steps else 0

    def steps_done(self, phase: PlannedPhase) -> int:
        """Steps of a phase that are done: all of it once a later phase has begun."""
        if not self.steps:
            return 0
        order = [planned.name for planned in self.phases]
        here, last = order.index(phase.name), self.steps[-1]
        reached = order.index(last.phase)
        return last.step + 1 if here == reached else phase.steps if here < reached else 0

    @property
    def complete(self) -> bool:
        """Whether every step of every phase is done."""
        return all(self.steps_done(phase) >= phase.steps for phase in self.phases)


def read_history(run_folder: Path) -> History:
    """Reads a run folder. Raises RunError if it is none, ConfigError if its run.yaml is not valid."""
    for name in ("run.yaml", "plan.json"):
        if not (run_folder / name).is_file():
            raise RunError(f"{run_folder}: no run folder, it has no {name}; give the folder that `crystal submit` made")
    history = _read_plan(run_folder)
    _read_metrics(history)
    history.attempts = sorted(_records(history, "attempts/*.json", _attempt), key=lambda attempt: attempt.number)
    history.evaluations = sorted(_records(history, "evals/*.json", _evaluation), key=lambda found: found.tokens)
    checkpoints = _records(history, "checkpoints/*/step_*/manifest.json", _checkpoint)
    history.checkpoints = sorted(checkpoints, key=lambda found: (found.tokens, found.step))
    for line in files.read_lines(run_folder / "saves.jsonl"):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            history.saves.append(Save(str(line["phase"]), int(line["step"]), float(line["stood_still"])))
    exports = (path.name for path in run_folder.glob("exports/*/"))
    history.exports = sorted(name for name in exports if not name.endswith(files.PENDING))
    return history


def time_spent(history: History) -> dict[str, float]:
    """Seconds by what they went into, from the first start to the last sign of life.

    Start-up is measured: from an attempt's start to the beginning of its first step, and all of it where no step was
    reached. Saving is what training stood still for. What nothing accounts for is "other".
    """
    if not history.attempts:
        return {}
    begun: dict[int, float] = {}
    for step in (*history.steps, *history.redone):
        begun[step.attempt] = min(step.time - step.seconds, begun.get(step.attempt, math.inf))
    ends = last_signs(history)
    alive = math.fsum(ends[attempt.number] - attempt.started for attempt in history.attempts)
    waits = (begun.get(attempt.number, ends[attempt.number]) - attempt.started for attempt in history.attempts)
    wall = max(ends.values()) - min(attempt.started for attempt in history.attempts)
    spent = {
        # An update that waits for a save is part of a step, and of the save.
        "training": math.fsum(max(step.seconds - step.wait - _known(step.save_wait), 0) for step in history.steps),
        "data wait": math.fsum(step.wait for step in history.steps),
        "steps redone": math.fsum(step.seconds for step in history.redone),
        "start-up": math.fsum(max(wait, 0) for wait in waits),
        "saving": math.fsum(save.stood_still for save in history.saves),
    }
    spent["other"] = max(alive - math.fsum(spent.values()), 0)
    spent["between attempts"] = max(wall - alive, 0)
    return spent


def last_signs(history: History) -> dict[int, float]:
    """When each attempt ended or, while that is not recorded, when its last step did (unix seconds by attempt)."""
    seen = {attempt.number: attempt.started for attempt in history.attempts}
    for step in (*history.steps, *history.redone):
        if step.attempt in seen:
            seen[step.attempt] = max(step.time, seen[step.attempt])
    return seen | {attempt.number: attempt.ended for attempt in history.attempts if attempt.ended is not None}


def state(history: History) -> str:
    """Where the run stands, in one sentence."""
    if not history.attempts and not history.steps:
        return "Not started: no attempt has been recorded."
    last = history.attempts[-1] if history.attempts else None
    if history.complete and last and last.outcome == "finished":
        return "Finished: every phase is done."
    where = _where(history)
    if last is None:
        return f"Stopped {where}; no attempt has been recorded."
    if last.outcome is None:
        return f"Running {where}; last sign of life {when(last_signs(history)[last.number])} UTC."
    if last.outcome == "finished":
        return f"Waiting for its next phase, {where}."
    reason = f": {last.reason}" if last.reason else ""
    return f"Stopped {where} ({last.ending}){reason}"


def _where(history: History) -> str:
    if not history.steps:
        return "before its first step"
    phase = next(phase for phase in history.phases if phase.name == history.steps[-1].phase)
    return f"in phase {phase.name} after {history.steps_done(phase):,} of {phase.steps:,} steps"


def when(seconds: float) -> str:
    """A unix time in UTC, to the minute, and a dash for one that no calendar has."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return "\N{EN DASH}"


def _read_plan(folder: Path) -> History:
    run = load_run(folder / "run.yaml")
    try:
        plan = files.read_json(folder / "plan.json")
        stores = {
            str(name): Store(str(store["store"]), int(store["tokens"]), str(store["digest"]))
            for name, store in plan["sources"].items()
        }
        phases: list[PlannedPhase] = []
        for phase in plan["phases"]:
            start = phases[-1].start + phases[-1].tokens if phases else 0
            shares = {
                str(name): Share(int(share["samples"]), int(share["tokens"]), float(share["epochs"]))
                for name, share in phase["sources"].items()
            }
            phases.append(PlannedPhase(str(phase["name"]), start, int(phase["steps"]), int(phase["tokens"]), shares))
        return History(folder, run, (folder / "run.yaml").read_text(), str(plan["digest"]), stores, phases)
    except _DAMAGE as error:
        raise RunError(f"{folder / 'plan.json'}: not a plan ({_said(error)}); submit the run again") from error


def _read_metrics(history: History) -> None:
    """Sorts the lines into those that count and those that were redone."""
    order = {phase.name: index for index, phase in enumerate(history.phases)}
    lines, bad = [], 0
    for line in files.read_lines(history.folder / "metrics.jsonl"):
        step = _step(line)
        if step is None or step.phase not in order:
            bad += 1
        else:
            lines.append(step)
    lines.sort(key=lambda step: step.attempt)
    for step in lines:
        # A step of a later attempt undoes all that stood at or past it, also what it has not yet reached again.
        here = (order[step.phase], step.step)
        while history.steps and (order[history.steps[-1].phase], history.steps[-1].step) >= here:
            history.redone.append(history.steps.pop())
        history.steps.append(step)
    if bad:
        history.notes.append(f"metrics.jsonl: {bad} lines are no step of this run and were left out")
    missing = sum(history.steps_done(phase) for phase in history.phases) - len(history.steps)
    if missing:
        history.notes.append(f"metrics.jsonl: {missing} steps were done without leaving a readable line")


def _records(history: History, pattern: str, parse: Callable[[Any], Record]) -> Iterator[Record]:
    """The JSON files of a kind; one that cannot be understood becomes a note."""
    for path in sorted(history.folder.glob(pattern)):
        name = path.relative_to(history.folder)
        if any(part.endswith((files.PENDING, PRUNED)) for part in name.parts):
            continue
        try:
            yield parse(files.read_json(path))
        except _DAMAGE as error:
            history.notes.append(f"{name}: not understood and left out ({_said(error)})")


def _step(line: dict[str, Any]) -> Step | None:
    try:
        return Step(
            phase=str(line["phase"]),
            step=int(line["step"]),
            attempt=int(line["attempt"]),
            time=float(line["time"]),
            loss=_number(line["loss"]),
            grad_norm=_number(line.get("grad_norm")),
            rate=_number(line.get("lr")),
            tokens=int(line["tokens"]),
            seconds=float(line["seconds"]),
            wait=float(line.get("wait") or 0),
            **{name: _number(line.get(name)) for name in MEASURED},
        )
    except _DAMAGE:
        return None


def _attempt(entry: Any) -> Attempt:
    ended, durable, ranks = entry.get("ended"), entry.get("signal_to_durable"), entry.get("ranks")
    return Attempt(
        number=int(entry["attempt"]),
        job=str(entry.get("job") or ""),
        host=str(entry.get("host") or ""),
        ranks=None if ranks is None else int(ranks),
        started=float(entry["started"]),
        ended=None if ended is None else float(ended),
        outcome=entry.get("outcome") and str(entry["outcome"]),
        reason=str(entry.get("reason") or ""),
        first_step=_position(entry.get("first_step")),
        last_step=_position(entry.get("last_step")),
        signal=entry.get("signal") and str(entry["signal"]),
        signal_to_durable=None if durable is None else float(durable),
        redone_steps=int(entry.get("redone_steps") or 0),
        startup={str(part): _number(seconds) for part, seconds in (entry.get("startup") or {}).items()},
        commit=entry.get("commit") and str(entry["commit"]),
        backend=str(entry.get("backend") or ""),
        versions={str(name): str(version) for name, version in (entry.get("versions") or {}).items()},
    )


def _position(value: Any) -> Position | None:
    return None if value is None else Position(str(value["phase"]), int(value["step"]))


def _evaluation(entry: Any) -> Evaluation:
    losses = {str(name): _number(loss) for name, loss in entry["losses"].items()}
    return Evaluation(str(entry["phase"]), int(entry["step"]), int(entry["tokens"]), losses)


def _checkpoint(entry: Any) -> Checkpoint:
    size = sum(int(file["bytes"]) for file in entry["files"].values())
    return Checkpoint(
        phase=str(entry["phase"]),
        step=int(entry["step"]),
        tokens=int(entry["tokens"]),
        why=str(entry.get("why") or ""),
        bytes=size,
        seconds=float(entry.get("seconds") or 0),
    )


def _number(value: Any) -> float:
    """A float, and not-a-number where there is none."""
    return math.nan if value is None else float(value)


def _known(number: float) -> float:
    return number if math.isfinite(number) else 0.0


def _said(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
