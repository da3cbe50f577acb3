"""The checkpoints of a run in words and numbers, and what a user may do with them: verify, name, delete.

What `crystal checkpoints` prints. Works beside a running job, and without torch: all of it stands in manifests.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.config.units import format_bytes, format_count, format_seconds
from crystal_hpc.errors import CheckpointError, DiskError, RunError
from crystal_hpc.progress import Progress
from crystal_hpc.train.generations import (
    Generation,
    damaged,
    find_damage,
    generations,
    mark_verified,
    pending,
    quarantined,
    unmark_verified,
)
from crystal_hpc.train.retention import reasons_to_keep

COLUMNS = ("phase", "step", "tokens", "size", "age", "saved", "verified", "kept")
NUMBERS = ("step", "tokens", "size", "age")  # to the right

Damage = list[tuple[str, list[str]]]


def open_run(folder: Path) -> Run:
    """The config of a run folder. Raises RunError where it is none."""
    if not (folder / "run.yaml").exists():
        raise RunError(f"{folder}: not a run folder (it has no run.yaml); runs are made by: crystal submit")
    return load_run(folder / "run.yaml")


def find_generation(folder: Path, run: Run, label: str) -> Generation:
    """The generation that a user calls PHASE/STEP. Raises RunError where there is none, naming those that exist."""
    found = generations(folder, run)
    phase, _, step = label.rpartition("/")
    number = step.removeprefix("step_")  # the folder's name, as shells complete it
    for generation in found:
        if number.isdecimal() and (phase, int(number)) == (generation.manifest.phase, generation.manifest.step):
            return generation
    there = ", ".join(one.label for one in found) or "none"
    raise RunError(f"{folder}: has no checkpoint {label}; PHASE/STEP is one of: {there}")


@dataclass(frozen=True)
class Listing:
    """Everything below `checkpoints/` and `quarantine/` of a run."""

    generations: list[dict[str, Any]]
    """Each: `phase`, `step`, `tokens`, `bytes`, `created`, `why`, `verified` (unix time or null), `kept` (a list of
    reasons; empty: may go), `folder`."""
    damaged: list[tuple[str, str]]
    """Folder and reason of what is no generation, and not in quarantine yet."""
    quarantined: list[tuple[str, str]]
    pending: list[str]

    @property
    def bytes(self) -> int:
        """Size of all generations together."""
        return sum(generation["bytes"] for generation in self.generations)


def list_checkpoints(folder: Path, run: Run) -> Listing:
    """What there is now."""
    found = generations(folder, run)
    reasons = reasons_to_keep(run, found)
    return Listing(
        [_described(generation, reasons[generation.folder]) for generation in found],
        [(str(path), reason) for path, reason in damaged(folder, run)],
        [(str(path), reason) for path, reason in quarantined(folder)],
        [str(path) for path in pending(folder)],
    )


def _described(generation: Generation, reasons: list[str]) -> dict[str, Any]:
    manifest = generation.manifest
    return {
        **{key: getattr(manifest, key) for key in ("phase", "step", "tokens", "bytes", "created", "why")},
        "verified": generation.verified["time"] if generation.verified else None,
        "kept": reasons or (["a link"] if generation.folder.is_symlink() else []),
        "folder": str(generation.folder),
    }


def table_rows(listing: Listing) -> list[list[str]]:
    """A line for each generation, by `COLUMNS`."""
    return [
        [
            one["phase"],
            f"{one['step']:,}",
            format_count(one["tokens"]),
            format_bytes(one["bytes"]),
            _age(one["created"]),
            one["why"],
            f"{_age(one['verified'])} ago" if one["verified"] else "no",
            ", ".join(one["kept"]) or "may go",
        ]
        for one in listing.generations
    ]


def _age(moment: float) -> str:
    return format_seconds(max(time.time() - moment, 0.0))


def describe_table(rows: list[list[str]]) -> str:
    """The rows under their headings, as plain text."""
    widths = [max(len(row[at]) for row in [list(COLUMNS), *rows]) for at in range(len(COLUMNS))]
    lines = []
    for row in [list(COLUMNS), *rows]:
        cells = [
            cell.rjust(width) if name in NUMBERS else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def describe_rest(listing: Listing) -> str:
    """What stands below the table: the total, and all that does not count."""
    count = len(listing.generations)
    lines = [f"{count} checkpoint{'' if count == 1 else 's'}, {format_bytes(listing.bytes)}"]
    for path, reason in listing.damaged:
        lines.append(f"damaged: {path}: {reason}; the next start of the run moves it to quarantine")
    for path, reason in listing.quarantined:
        lines.append(f"quarantined: {path}: {reason}")
    for path in listing.pending:
        lines.append(f"pending: {path}: a save or deletion goes on, or was cut short; the next start deletes it")
    return "\n".join(lines)


def verify(folder: Path, run: Run, on_line: Callable[[str], None], on_progress: Progress) -> Damage:
    """Reads all files of all generations, marks the sound ones, and returns what is wrong with the others, by label.

    Nothing is moved: a job that runs may be reading it. Only a mark that has been proved wrong is taken away.
    """
    bad: Damage = [(f"{path.parent.name}/{path.name}", [reason]) for path, reason in damaged(folder, run)]
    for generation in generations(folder, run):

        def progress(_: str, done: int, total: int, label: str = generation.label) -> None:
            on_progress(f"verifying {label}", done, total)

        try:
            findings = find_damage(generation.folder, generation.manifest, on_progress=progress)
            if not generation.folder.exists():
                continue  # a running job has deleted it meanwhile
            (unmark_verified if findings else _mark)(generation.folder)
        except DiskError as error:
            on_line(f"{generation.label}: the result cannot be noted: {error}")
        except CheckpointError as error:
            findings = [str(error)] if generation.folder.exists() else []
        if findings:
            bad.append((generation.label, findings))
    return bad


def _mark(folder: Path) -> None:
    mark_verified(folder, f"crystal checkpoints on {os.uname().nodename}")
