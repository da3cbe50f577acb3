"""A run as a chain of jobs: for each phase the training, with staging before it and evaluation after it if asked for.

What is done, what is still to do, and what waits for what. `request` turns a link into an sbatch script, `queueing`
queues them, `batch` is what their scripts run before and after the ranks.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Cluster, Phase, Run

Kind = Literal["stage", "train", "evaluate"]


@dataclass(frozen=True)
class Link:
    """One job of the chain, or one array of slices."""

    kind: Kind
    phase: str
    slices: int = 1
    """Elements of the array, one after the other; 1 for a job of its own."""
    after: tuple[tuple[str, int], ...] = ()
    """Links before this one, by their place in the chain, each with Slurm's kind of dependency."""


def make_chain(run: Run, cluster: Cluster, done: Collection[tuple[Kind, str]], most_elements: int) -> list[Link]:
    """The jobs that are left, in order of submission; `most_elements` of an array are allowed (MaxArraySize).

    A phase whose slices are too many for one array gets several, one after the other.
    """
    links: list[Link] = []
    trained: int | None = None
    staged: int | None = None
    sliced = cluster.slurm.resume_by == "slices"
    # Slices end with whatever befell them, so the next phase begins after any end, and looks for itself (`batch`).
    after_training = "afterany" if sliced else "afterok"

    def add(link: Link) -> int:
        links.append(link)
        return len(links) - 1

    for phase in run.phases:
        if ("train", phase.name) not in done:
            waits: list[tuple[str, int]] = [(after_training, trained)] if trained is not None else []
            if cluster.slurm.stage and ("stage", phase.name) not in done:
                staged = add(Link("stage", phase.name, after=(("afterany", staged),) if staged is not None else ()))
                waits.append(("afterok", staged))
            left = cluster.slurm.slices if sliced else 1
            while left > 0:
                slices = min(left, most_elements)
                trained = add(Link("train", phase.name, slices, tuple(waits)))
                waits, left = [("afterany", trained)], left - slices
        if cluster.slurm.evaluate and ("evaluate", phase.name) not in done:
            before = ((after_training, trained),) if ("train", phase.name) not in done and trained is not None else ()
            add(Link("evaluate", phase.name, after=before))
    return links


def staged_path(folder: Path, phase: str) -> Path:
    """Written once the stores of a phase have been read against their digests."""
    return folder / "staged" / f"{phase}.json"


def done_links(folder: Path, run: Run, cluster: Cluster | None) -> set[tuple[Kind, str]]:
    """What of the chain is already done, by what lies in the run's folder."""
    elsewhere = cluster is not None and cluster.executor == "slurm" and cluster.slurm.evaluate is not None
    found: set[tuple[Kind, str]] = set()
    for phase in run.phases:
        evaluated = not run.data.held_out or (folder / "evals" / f"{phase.name}.json").exists()
        if is_at_end(folder, phase) and (evaluated or elsewhere):
            found.add(("train", phase.name))
        if evaluated:
            found.add(("evaluate", phase.name))
        if staged_path(folder, phase.name).exists():
            found.add(("stage", phase.name))
    return found


def is_trained(folder: Path, run: Run, cluster: Cluster | None, phase: str | None = None) -> bool:
    """Whether a phase (None: every one) has nothing left to train."""
    done = done_links(folder, run, cluster)
    return all(("train", name) in done for name in ([phase] if phase else [phase.name for phase in run.phases]))


def is_at_end(folder: Path, phase: Phase) -> bool:
    """Whether the checkpoint at the end of a phase is there."""
    generation = f"step_{derive.phase_steps(phase):08d}"
    return (folder / "checkpoints" / phase.name / generation / "manifest.json").exists()
