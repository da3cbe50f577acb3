"""What a rank sets up once torch is imported: process groups, stores, model; then it hands over to `train.loop`.

`task` imports this module late, on purpose: it is the one door through which torch and Megatron-core enter a job.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.data.catalog import StoreInfo
from crystal_hpc.data.sources import Sources, read_sources
from crystal_hpc.data.store import TokenStore
from crystal_hpc.errors import StoreError
from crystal_hpc.model import backend, parallel
from crystal_hpc.train import loop
from crystal_hpc.train.metrics import Metrics
from crystal_hpc.train.preemption import StopFlag
from crystal_hpc.train.state import Position
from crystal_hpc.train.step import build_trainer

Listener = Callable[[str, dict[str, Any], int], None]


@dataclass(frozen=True)
class Session:
    """A rank that has joined its job."""

    run: Run
    folder: Path
    sources: Sources
    layout: parallel.Layout
    backend: str

    def job(self, flag: StopFlag, attempt: int, listener: Listener) -> loop.Job:
        """Model, stores and metrics, ready for `loop.train`. The listener hears events, positions and redone steps."""
        metrics = Metrics(self.folder, self.layout.comm.rank, attempt)
        before = files.last_line(self.folder / "metrics.jsonl")

        def on_event(event: str, position: Position) -> None:
            listener(event, position.named(self.run), _redone(self.run, position, before))

        return loop.Job(
            run=self.run,
            folder=self.folder,
            trainer=build_trainer(self.run, self.layout),
            flag=flag,
            sources=_open(self.sources.training),
            held_out=_open(self.sources.held_out),
            metrics=metrics,
            on_event=on_event,
        )

    def stop(self) -> None:
        """Leaves the process groups."""
        parallel.stop()


def start(folder: Path, rank: int, ranks: int, local_rank: int, init_method: str) -> Session:
    """Joins the job's ranks. Raises CrystalError where the run folder, stores or machine do not fit."""
    run = load_run(folder / "run.yaml")
    sources = read_sources(run)
    check_unchanged(sources, files.read_json(folder / "plan.json"))
    layout = parallel.start(run, rank, ranks, local_rank, init_method)
    return Session(run, folder, sources, layout, "cuda" if backend.device().type == "cuda" else "cpu-rig")


def check_unchanged(sources: Sources, plan: dict[str, Any]) -> None:
    """Raises StoreError if a store is not the one that the run was begun with."""
    for name, begun in plan["sources"].items():
        info = sources.training[name]
        if (info.tokens, info.digest) != (begun["tokens"], begun["digest"]):
            raise StoreError(
                f"{info.folder}: source {name!r} is not the store that this run was begun with ({info.tokens} tokens, "
                f"digest {info.digest}; it was {begun['tokens']}, {begun['digest']}); bring that one back"
            )


def _open(infos: dict[str, StoreInfo]) -> dict[str, TokenStore]:
    return {name: TokenStore.open(info.folder) for name, info in infos.items()}


def _redone(run: Run, position: Position, before: dict[str, Any] | None) -> int:
    """Steps that an earlier attempt had done, and that this one, starting at `position`, has to do again."""
    if before is None:
        return 0
    reached = Position.from_named(run, before).after_step()
    return max(0, _count(run, reached) - _count(run, position))


def _count(run: Run, position: Position) -> int:
    return sum(derive.phase_steps(phase) for phase in run.phases[: position.phase]) + position.step
