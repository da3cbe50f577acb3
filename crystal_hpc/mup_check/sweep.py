"""A sweep's folder, and the jobs that fill it: workers of a local job, or elements of a Slurm array.

<folder>/run.yaml  sweep.json    what is swept
<folder>/points/*.json           a file for each finished training; what is there is not trained again
<folder>/jobs.json  logs/        the jobs queued so far, and what they said
<folder>/report.html *.svg       what `page` made of it
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config.load import dump_yaml
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.data.sources import read_sources
from crystal_hpc.errors import RunError, SlurmError
from crystal_hpc.jobs import queueing, slurm, submitted
from crystal_hpc.jobs.request import python_command, worker_parameters
from crystal_hpc.jobs.submit import submit_here, with_absolute_paths
from crystal_hpc.mup_check.points import Point, Sweep, points
from crystal_hpc.mup_check.worker import SweepTask, result_path
from crystal_hpc.progress import Progress


def prepare(folder: Path, run: Run, sweep: Sweep) -> list[Point]:
    """Makes a sweep's folder, or takes it up again; returns its points.

    A folder may be given more widths and rates, or fewer, but holds one config. Raises CrystalError where the config,
    its stores, or what the folder holds do not fit.
    """
    found = points(run, sweep)
    stores = {name: info.digest for name, info in read_sources(found[0].run).training.items()}
    _refuse_another(folder, found, stores)
    for part in ("points", "locks", "logs"):
        files.make_folder(folder / part)
    files.write_file(folder / "run.yaml", dump_yaml(with_absolute_paths(run)))
    files.write_json(folder / "stores.json", stores)
    files.write_json(folder / "sweep.json", asdict(sweep))
    return found


def missing(folder: Path, found: list[Point]) -> list[Point]:
    """The points that are still to be trained."""
    return [point for point in found if not result_path(folder, point).exists()]


def submit(folder: Path, cluster: Cluster, workers: int) -> list[Any]:
    """Starts that many workers on a prepared folder; returns submitit's jobs. Raises CrystalError.

    Locally there are as many as the profile has ranks.
    """
    task = SweepTask(folder)
    if cluster.executor == "local":
        return [submit_here(task, folder / "logs", cluster)]
    from crystal_hpc.jobs.executor import Executor

    queueing.check_path(folder)
    if not slurm.is_there():
        raise SlurmError("sbatch: not found; submit from a login node, or choose a cluster with executor: local")
    workers = min(workers, max(queueing.most_elements(slurm.configuration()), 1))
    parameters = worker_parameters(f"{folder.name}.mup", cluster, workers)
    jobs = Executor(folder / "logs", python_command(cluster), parameters).submit_slices(task, workers)
    submitted.add_job(folder, {"id": jobs[0].job_id.partition("_")[0], "kind": "sweep", "phase": "", "slices": workers})
    return jobs


def queued(folder: Path) -> list[str]:
    """Ids of the arrays of this sweep that wait or work in Slurm's queue."""
    return sorted({job.array for job in submitted.queued(folder)}) if submitted.read_jobs(folder) else []


def follow(folder: Path, found: list[Point], jobs: list[Any], on_progress: Progress) -> None:
    """Waits until local jobs are over, telling how many points are done. Raises RunError if some are missing then."""
    over = False
    while not over:
        over = all(job.done() for job in jobs)
        left = missing(folder, found)
        on_progress("points", len(found) - len(left), len(found), f"{len(left)} to go")
        time.sleep(0 if over else 0.5)
    if left:
        raise RunError(
            f"{folder}: {len(left)} of {len(found)} points were not trained, the first is {left[0].name}; see "
            f"{folder / 'logs'}, then give the same command again"
        )


def read_results(folder: Path, found: list[Point]) -> list[dict[str, Any]]:
    """What the finished points came to."""
    paths = [result_path(folder, point) for point in found]
    return [files.read_json(path) for path in paths if path.exists()]


def _refuse_another(folder: Path, found: list[Point], stores: dict[str, str]) -> None:
    if (folder / "stores.json").exists() and files.read_json(folder / "stores.json") != stores:
        raise RunError(f"{folder}: was begun with other token stores; choose another folder, or those stores")
    for point in found:
        path = result_path(folder, point)
        if path.exists() and files.read_json(path)["digest"] != point.about["digest"]:
            raise RunError(
                f"{path}: was trained with another config or number of steps; choose another folder, or delete it"
            )
