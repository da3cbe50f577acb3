"""What a rank sets up once torch is imported: process groups, stores, model; then it hands over to `train.loop`.

`task` imports this module late, on purpose: it is the one door through which torch and Megatron-core enter a job.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.data.catalog import StoreInfo
from crystal_hpc.data.rows import RowSource
from crystal_hpc.data.sources import Sources, open_source, read_sources
from crystal_hpc.errors import StoreError
from crystal_hpc.jobs import rendezvous
from crystal_hpc.jobs.chain import is_at_end
from crystal_hpc.jobs.launch import read_cluster
from crystal_hpc.jobs.local_disk import LocalDisk, read_staging
from crystal_hpc.jobs.place import Place
from crystal_hpc.model import parallel
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
    evaluated_elsewhere: bool = False
    """Whether a job of its own computes the held-out losses."""
    disk: LocalDisk | None = None
    """What of the data is on this node's own disk."""

    def job(
        self,
        flag: StopFlag,
        attempt: int,
        listener: Listener,
        beat: Callable[..., None] = lambda _doing, step=False: None,
        until: str | None = None,
    ) -> loop.Job:
        """Model, stores and metrics, ready for `loop.train`. The listener hears events, positions and redone steps.

        `beat` hears signs of life (`train.watchdog`); `until` names the last phase to train, None for all.
        """
        metrics = Metrics(self.folder, self.layout.comm.rank, attempt)
        before = files.last_line(self.folder / "metrics.jsonl")

        def on_event(event: str, position: Position) -> None:
            listener(event, position.named(self.run), _redone(self.run, position, before))

        return loop.Job(
            run=self.run,
            folder=self.folder,
            trainer=build_trainer(self.run, self.layout),
            flag=flag,
            sources=self._training_sources(until),
            held_out=_open(self.sources.held_out, self.run),
            metrics=metrics,
            on_event=on_event,
            beat=beat,
            last_phase=[phase.name for phase in self.run.phases].index(until) if until else None,
            evaluates=not self.evaluated_elsewhere,
            prepared=self.disk.prepared if self.disk else lambda _phase: None,
        )

    def _training_sources(self, until: str | None) -> dict[str, RowSource]:
        opened = _open(self.sources.training, self.run)
        if self.disk is None:
            return opened
        asked = [phase for phase in self.run.phases if until in (None, phase.name)]
        read = {name for phase in asked if not is_at_end(self.folder, phase) for name in phase.mixture}
        return {name: self.disk.nearest(source) if name in read else source for name, source in opened.items()}

    def stop(self) -> None:
        """Leaves the process groups."""
        parallel.stop()


def start(folder: Path, place: Place) -> Session:
    """Joins the job's ranks. Raises CrystalError where the run folder, stores or machine do not fit."""
    run = load_run(folder / "run.yaml")
    sources = read_sources(run)
    check_unchanged(sources, files.read_json(folder / "plan.json"))
    meeting = rendezvous.meet(folder / "attempts", place)
    layout = parallel.start(run, place.rank, place.ranks, place.local_rank, meeting)
    cluster = read_cluster(folder)
    elsewhere = cluster is not None and cluster.executor == "slurm" and cluster.slurm.evaluate is not None
    return Session(run, folder, sources, layout, elsewhere, _local_disk(folder, run, sources, layout, place))


def _local_disk(folder: Path, run: Run, sources: Sources, layout: parallel.Layout, place: Place) -> LocalDisk | None:
    """What the profile's staging has brought, or will bring, to this node's disk. A collective call."""
    staging = read_staging(folder)
    if staging is None:
        return None
    # Of the ranks of a node that read the same rows (tensor and pipeline neighbours), the first has slices made.
    mine = (place.node or os.uname().nodename, layout.data_rank)
    leads = layout.comm.gather(mine).index(mine) == layout.comm.rank
    share = layout.data_rank, layout.data_size
    return LocalDisk(staging, run, sources, folder / "run.yaml", share, leads, speaks=place.local_rank == 0)


def check_unchanged(sources: Sources, plan: dict[str, Any]) -> None:
    """Raises StoreError if a store is not the one that the run was begun with."""
    for name, begun in plan["sources"].items():
        info = sources.training[name]
        if (info.tokens, info.digest) != (begun["tokens"], begun["digest"]):
            raise StoreError(
                f"{info.folder}: source {name!r} is not the store that this run was begun with ({info.tokens} tokens, "
                f"digest {info.digest}; it was {begun['tokens']}, {begun['digest']}); bring that one back"
            )


def _open(infos: dict[str, StoreInfo], run: Run) -> dict[str, RowSource]:
    return {name: open_source(info, run.model.vocab_size, run.data.check) for name, info in infos.items()}


def _redone(run: Run, position: Position, before: dict[str, Any] | None) -> int:
    """Steps that an earlier attempt had done, and that this one, starting at `position`, has to do again."""
    if before is None:
        return 0
    reached = Position.from_named(run, before).after_step()
    return max(0, _count(run, reached) - _count(run, position))


def _count(run: Run, position: Position) -> int:
    return sum(derive.phase_steps(phase) for phase in run.phases[: position.phase]) + position.step
