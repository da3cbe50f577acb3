"""What is known of a state that has been written, as its manifest says it, and whether it can be what it claims to be.

Rank 0's part of a save (`checkpoint`), once it has been told what every rank has written.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import xxhash

from crystal_hpc import files, provenance
from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.data.order import PhaseOrder
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train import distcp, keys
from crystal_hpc.train.manifest import FileEntry, Manifest, TensorEntry, Why
from crystal_hpc.train.state import Position
from crystal_hpc.train.writing import RankResult

Ledger = dict[str, dict[str, dict[str, int]]]


def describe(
    results: list[RankResult],
    folder: Path,
    *,
    run: Run,
    position: Position,
    ledger: Ledger,
    why: Why,
    ranks: int,
    adam_steps: int,
    began: float,
) -> Manifest:
    """The manifest of what the ranks have written into a folder, and of the small files beside that."""
    written = {result.file.name: FileEntry(result.file.bytes, result.file.digest) for result in results}
    small = [folder / name for name in distcp.INDEX_FILES]  # not what else may lie there, as NFS leaves it
    now = time.time()
    return Manifest(
        kind="training",
        run=run.name,
        digest=derive.run_digest(run),
        phase=run.phases[position.phase].name,
        step=position.step,
        tokens=position.tokens(run),
        why=why,
        layout={"ranks": ranks, **run.parallel.model_dump()},
        precision=run.precision,
        ledger=ledger,
        optimizer={"steps": adam_steps},
        files=written | {path.name: FileEntry(path.stat().st_size, files.digest_file(path)) for path in small},
        tensors=_tensors(results),
        commit=provenance.commit(),
        versions=provenance.versions(),
        created=now,
        seconds=now - began,
        weights=_digest_of_weights(results),
    )


def ledger(run: Run, orders: Sequence[PhaseOrder], position: Position) -> dict[str, dict[str, dict[str, int]]]:
    """Samples and tokens that the run has consumed, by phase and source: a consequence of the position."""
    found = {}
    for index, (phase, order) in enumerate(zip(run.phases, orders, strict=True)):
        steps = derive.phase_steps(phase) if index < position.phase else position.step
        if index <= position.phase:
            consumed = order.consumed(steps * phase.batch_size)
            found[phase.name] = {
                name: {"samples": count, "tokens": count * phase.sequence_length} for name, count in consumed.items()
            }
    return found


def refuse_stale(run: Run, last: Manifest | None, manifest: Manifest) -> None:
    """Steps change weights: if they are those of the generation before, bit for bit, something writes old ones.

    Raises CheckpointError then. Only what the same layout has written can be compared.
    """
    if last is None or last.weights != manifest.weights or last.layout != manifest.layout:
        return
    then, now = (Position.from_named(run, {"phase": one.phase, "step": one.step}) for one in (last, manifest))
    if any(rate > 0 for rate in _rates(run, then, now)):
        raise CheckpointError(
            f"the weights after step {now.step} of phase {manifest.phase} are, bit for bit, those after step "
            f"{then.step} of phase {last.phase}, though steps passed: nothing was saved, and the run stops; the "
            "checkpoint before it is kept"
        )


def _tensors(results: list[RankResult]) -> dict[str, TensorEntry]:
    """Shape, dtype and norm of each tensor of the model."""
    squares: dict[tuple[str, int | None], float] = defaultdict(float)
    for result in results:
        for at, value in result.squares.items():
            squares[at] += value
    about = {place.key: place for result in results for place in result.file.placed}
    found = {}
    for (key, layer), value in squares.items():
        place = about[key]
        shape = place.shape if layer is None else place.shape[1:]
        name = keys.name_of(key, layer)
        found[name] = TensorEntry(tuple(shape), str(place.dtype).removeprefix("torch."), value**0.5)
    return dict(sorted(found.items()))


def _digest_of_weights(results: list[RankResult]) -> str:
    boxes = sorted(box for result in results for box in result.weights.items())
    return xxhash.xxh3_128_hexdigest(repr(boxes).encode())


def _rates(run: Run, then: Position, now: Position) -> list[float]:
    """The learning rates of the steps between two positions."""
    found = []
    for index in range(then.phase, now.phase + 1):
        phase = run.phases[index]
        first = then.step if index == then.phase else 0
        last = now.step if index == now.phase else derive.phase_steps(phase)
        found += [derive.learning_rate(phase, step) for step in range(first, last)]
    return found
