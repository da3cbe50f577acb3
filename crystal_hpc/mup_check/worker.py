"""What trains the points of a sweep: a process that takes one after the other until none is left.

Any number of them share a sweep through locks on files: processes of a local job, or elements of a Slurm array. A
point's file appears whole or not at all, so one that was stopped half way is simply trained again.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.errors import RunError
from crystal_hpc.jobs.place import Place, my_place
from crystal_hpc.log import log, setup_logging
from crystal_hpc.mup_check.points import Point, Sweep, points
from crystal_hpc.train.preemption import Stop, StopFlag, watch

if TYPE_CHECKING:
    from crystal_hpc.model.parallel import Layout


@dataclass(frozen=True)
class SweepTask:
    """A worker, as submitit pickles it. What it is to do stands in the sweep's folder."""

    folder: Path

    def __call__(self) -> str:
        """Trains points until none is left; leaves by SystemExit if told to stop before."""
        flag, place = watch(), my_place()
        setup_logging(0, place.job, 0)
        work(self.folder, flag, place)
        return "finished"


def read_points(folder: Path) -> list[Point]:
    """The points of a sweep's folder."""
    return points(load_run(folder / "run.yaml"), Sweep(**files.read_json(folder / "sweep.json")))


def result_path(folder: Path, point: Point) -> Path:
    """Where a point's result stands once it is finished."""
    return folder / "points" / f"{point.name}.json"


def work(folder: Path, flag: StopFlag, place: Place) -> None:
    """Trains every point that is neither finished nor in another worker's hands."""
    from crystal_hpc.model import parallel

    todo = read_points(folder)
    # Of workers that start together, each begins with another point.
    turn = _number(place) % len(todo)
    with tempfile.TemporaryDirectory() as meeting:
        layout = parallel.start(todo[0].run, 0, 1, place.local_rank, Path(meeting, "store"))
        for point in (*todo[turn:], *todo[:turn]):
            if not result_path(folder, point).exists():
                _take(folder, point, layout, flag)
            if flag.stop is not Stop.NO:
                log.info("told to leave; the same command goes on from here")
                sys.exit(0)  # not a return: submitit would record that as success
        parallel.stop()


def _number(place: Place) -> int:
    return int(place.job.partition("_")[2] or place.rank) if place.executor == "slurm" else place.rank


def _take(folder: Path, point: Point, layout: "Layout", flag: StopFlag) -> None:
    from crystal_hpc.mup_check.training import train_point

    lock = folder / "locks" / point.name
    try:
        with files.locked(lock, "another worker is at it"):
            if result_path(folder, point).exists():
                return
            log.info("%s begins", point.name)
            result = train_point(point, layout, lambda: flag.stop is not Stop.NO)
            if result is not None:
                files.write_json(result_path(folder, point), {**point.about, **result})
                log.info("%s is done", point.name)
    except RunError:
        return
