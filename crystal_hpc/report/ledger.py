"""What a run consumed, recomputed from config and stores alone, and compared with what its ranks really read.

Every step's metrics carry a digest of the rows that all ranks together handed to the model (`data.batches`). Here the
same digest is made again from the order function and the stores. If all agree, and every step stands exactly once in
the history, then no sample was lost, repeated or exchanged, whatever happened to the jobs in between.
"""

from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.config.units import format_count
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.sources import open_source, read_source_info
from crystal_hpc.errors import RunError

Steps = dict[tuple[str, int], dict[str, Any]]


def describe_ledger(folder: Path) -> str:
    """Samples and tokens of each source that the run has consumed so far, phase by phase."""
    run, steps, _ = _read(folder)
    lines = []
    for phase, order in zip(run.phases, _orders(run), strict=True):
        done = sum(name == phase.name for name, _ in steps)
        lines.append(f"{phase.name}: {done} of {derive.phase_steps(phase)} steps")
        for name, count in order.consumed(done * phase.batch_size).items():
            tokens = format_count(count * phase.sequence_length)
            lines.append(f"  {name:<22}{count:>10,} samples{tokens:>9} tokens")
    return "\n".join(lines)


def check_ledger(folder: Path) -> str:
    """Proves the history of a run; returns what was proved. Raises RunError at the first step that is wrong."""
    from crystal_hpc.data.fim import load_fims

    run, steps, repeated = _read(folder)
    _require_every_step_once(run, steps, folder)
    infos = {name: read_source_info(Path(path)) for name, path in run.data.sources.items()}
    sources = {name: open_source(info, run.model.vocab_size) for name, info in infos.items()}
    samples = 0
    for phase, order, fim in zip(run.phases, _orders(run), load_fims(run), strict=True):
        for step in range(sum(name == phase.name for name, _ in steps)):
            expected, found = _digest(order, sources, phase.batch_size, step, fim), steps[phase.name, step]["digest"]
            if found != expected:
                raise RunError(
                    f"{folder}: step {step} of phase {phase.name} read other rows than its plan says "
                    f"(digest {found}, not {expected})"
                )
            samples += phase.batch_size
    redone = f"{repeated} steps done twice after a crash" if repeated else "no step done twice"
    return f"{len(steps):,} steps, {samples:,} samples: each read once, as planned; {redone}"


def _read(folder: Path) -> tuple[Run, Steps, int]:
    """The run, each step's line (the latest attempt's), and how many lines a later attempt replaced."""
    if not (folder / "run.yaml").exists():
        raise RunError(f"{folder}: not a run folder (it has no run.yaml); runs are made by: crystal submit")
    steps: Steps = {}
    lines = 0
    for line in files.read_lines(folder / "metrics.jsonl"):
        steps[line["phase"], line["step"]] = line
        lines += 1
    return load_run(folder / "run.yaml"), steps, lines - len(steps)


def _orders(run: Run) -> list[PhaseOrder]:
    return run_orders(run, {name: read_source_info(Path(path)).tokens for name, path in run.data.sources.items()})


def _require_every_step_once(run: Run, steps: Steps, folder: Path) -> None:
    expected = [(phase.name, step) for phase in run.phases for step in range(derive.phase_steps(phase))]
    for key in expected[: len(steps)]:
        if key not in steps:
            raise RunError(f"{folder}: step {key[1]} of phase {key[0]} is missing from metrics.jsonl")


def _digest(order: PhaseOrder, sources: Any, batch_size: int, step: int, fim: Any) -> str:
    import numpy as np

    from crystal_hpc.data.rows import read_rows, rows_digest

    positions = np.arange(batch_size, dtype=np.int64) + step * batch_size
    rows = read_rows(order, [sources[name] for name in order.sources], positions, fim)
    return f"{rows_digest(rows, positions):016x}"
