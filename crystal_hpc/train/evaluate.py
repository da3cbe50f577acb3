"""Held-out loss at the end of a phase, on the same rows each time: evals/<phase>.json.

Runs after the phase's checkpoint is durable, and changes nothing in the model: cut short by a signal it is simply done
again by the next attempt.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from crystal_hpc import files
from crystal_hpc.data.batches import held_out_batches
from crystal_hpc.data.rows import RowSource
from crystal_hpc.log import log
from crystal_hpc.train.state import Position
from crystal_hpc.train.step import Trainer, evaluate_micro_batch


def evaluation_path(run_folder: Path, phase: str) -> Path:
    """Where the held-out losses at the end of a phase are kept."""
    return run_folder / "evals" / f"{phase}.json"


def evaluate_phase(
    trainer: Trainer,
    run_folder: Path,
    stores: Mapping[str, RowSource],
    position: Position,
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """Mean loss in nats by held-out store, unless that is already on disk; empty if told to stop before the end.

    `should_stop` is asked between micro-batches, on all ranks together. A collective call.
    """
    run, layout = trainer.run, trainer.layout
    phase = run.phases[position.phase]
    path = evaluation_path(run_folder, phase.name)
    if not stores or layout.comm.broadcast(path.exists()):
        return {}
    losses: dict[str, float] = {}
    rows: dict[str, int] = {}
    for name, store in stores.items():
        batches = held_out_batches(
            store,
            phase.sequence_length,
            run.evaluation.rows,
            run.parallel.micro_batch,
            layout.data_rank,
            layout.data_size,
        )
        found = []
        for batch in batches:
            if should_stop():
                return {}
            found.append(evaluate_micro_batch(trainer, batch))
        if not found:
            log.warning("held-out store %s is too small for one micro-batch on every rank; not evaluated", name)
            continue
        losses[name] = sum(found) / len(found)
        rows[name] = len(found) * run.parallel.micro_batch * layout.data_size
    if layout.comm.rank == 0:
        about = {**position.named(run), "tokens": position.tokens(run), "losses": losses, "rows": rows}
        files.make_folder(path.parent)
        files.write_json(path, about)
    layout.comm.barrier()
    return losses
