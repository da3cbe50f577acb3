"""From a run and a cluster to started jobs: checks everything that can be checked, freezes the run folder, submits.

`prepare` makes (or recognises) the run folder, `start` hands the jobs to submitit, `follow` watches a local one. All
three leave a folder that the same command picks up again.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import check_layout, dump_yaml, load_cluster, load_run
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.data.sources import Sources, read_sources
from crystal_hpc.errors import RunError, SlurmError
from crystal_hpc.jobs import chain, journal, queueing, submitted
from crystal_hpc.jobs.launch import read_cluster
from crystal_hpc.jobs.request import local_parameters
from crystal_hpc.report.plan import make_plan
from crystal_hpc.train.manifest import read_manifest
from crystal_hpc.train.preemption import held_back

Event = Callable[[str], None]
SECONDS_BETWEEN_LINES = 3.0


def submit(run: Run, cluster: Cluster, runs: Path | str = "runs") -> list[Any]:
    """Starts a run, or takes it up where it stopped; returns submitit's jobs, none if the run is finished.

    On Slurm these are the jobs of the chain in order, each slice of an array one job. Raises CrystalError.
    """
    folder = prepare(run, cluster, Path(runs))
    return [] if is_finished(folder) else start(folder, cluster)


def prepare(run: Run, cluster: Cluster | None, runs: Path) -> Path:
    """The run's folder, with run.yaml, plan.json and cluster.yaml. Raises CrystalError if the run cannot work here.

    A folder that exists is taken up again if it holds the same run; the parallel layout may differ. Without a cluster
    (a script submitted by hand) the ranks that the job turns out to have must fit.
    """
    folder = (runs / run.name).resolve()
    if cluster:
        check_layout(run, cluster)
        if cluster.executor == "slurm":
            queueing.check_path(folder)
    run = with_absolute_paths(run)
    sources = read_sources(run)
    if (folder / "run.yaml").exists():
        _refuse_another(folder, run, sources)
        if cluster:
            _refuse_running(folder)
    if run.start_from:
        _check_start(run, Path(run.start_from))
    for part in ("attempts", "logs", "checkpoints"):
        files.make_folder(folder / part)
    if not (folder / "plan.json").exists():
        files.write_json(folder / "plan.json", make_plan(run, sources))
    files.write_file(folder / "run.yaml", dump_yaml(run))
    if cluster:
        files.write_file(folder / "cluster.yaml", dump_yaml(cluster))
    return folder


def _check_start(run: Run, folder: Path) -> None:
    """Raises CheckpointError where the weights to begin with are not there, or are of another model.

    Shapes alone do not tell: a model with other rotary pairs or muP multipliers has the same.
    """
    manifest = read_manifest(folder)
    if manifest.kind == "training" and not (folder / "../../../run.yaml").exists():
        return  # copied away from its run: what its model was is not known
    from crystal_hpc.convert.names import Shape
    from crystal_hpc.convert.reader import run_of
    from crystal_hpc.convert.shapes import check_same

    origin = run_of(folder)
    check_same(Shape(run.model, run.mup), Shape(origin.model, origin.mup), str(folder))


def is_finished(folder: Path) -> bool:
    """Whether the run in a prepared folder has nothing left to do."""
    run, cluster = load_run(folder / "run.yaml"), read_cluster(folder)
    done = chain.done_links(folder, run, cluster)
    kinds: tuple[chain.Kind, ...] = ("train", "evaluate")
    return all((kind, phase.name) in done for kind in kinds for phase in run.phases)


def start(folder: Path, cluster: Cluster) -> list[Any]:
    """Submits what is left of a prepared run; returns submitit's jobs. They outlive this process."""
    with files.locked(folder / ".submitting", f"{folder}: is being submitted by another command just now"):
        _refuse_running(folder)  # again: another command may have been quicker
        submitted.clear(folder)
        return [_start_here(folder, cluster)] if cluster.executor == "local" else queueing.start_chain(folder, cluster)


def _start_here(folder: Path, cluster: Cluster) -> Any:
    from crystal_hpc.jobs.task import TrainTask

    with files.disk_errors(folder):
        return submit_here(TrainTask(folder), folder / "logs", cluster)


def submit_here(task: Any, logs: Path, cluster: Cluster) -> Any:
    """Starts a task on every rank of a local cluster; returns submitit's job, which outlives this process."""
    import submitit

    from crystal_hpc.jobs.executor import MANY

    executor = submitit.LocalExecutor(logs, max_num_timeout=MANY)
    executor.update_parameters(**local_parameters(cluster))
    # Held back from the first instruction of every rank on, through submitit's controller and its requeues. The
    # controller itself never lets them in: signals are for the ranks (`crystal cancel`).
    with _detached(), held_back(), _environment(cluster.environment):
        return executor.submit(task)


def dry_run(run: Run, cluster: Cluster, runs: Path) -> Iterator[tuple[str, str]]:
    """Title and text of each batch script that `submit` would queue. Raises CrystalError as it would."""
    if cluster.executor == "local":
        raise RunError(f"cluster {cluster.name}: --dry-run shows Slurm's scripts, and this profile is local")
    folder = (runs / run.name).resolve()
    check_layout(run, cluster)
    queueing.check_path(folder)
    for link, script in queueing.scripts(folder, with_absolute_paths(run), cluster):
        yield f"{link.kind} {link.phase}", script


def reopen(folder: Path, cluster_file: Path | None) -> tuple[Path, Cluster]:
    """A run that began before, prepared to go on, and its cluster: that of last time if none is named."""
    if not (folder / "run.yaml").exists():
        raise RunError(f"{folder}: not a run folder (it has no run.yaml); runs are made by: crystal submit")
    cluster = load_cluster(cluster_file) if cluster_file else read_cluster(folder)
    if cluster is None:
        raise RunError(f"{folder}: was started by hand and knows no cluster; name one with --cluster")
    return prepare(load_run(folder / "run.yaml"), cluster, folder.resolve().parent), cluster


def follow(folder: Path, jobs: list[Any], since: int, on_line: Event) -> bool:
    """Watches jobs until they are over, telling each new step, and each attempt after the first `since` ones.

    Returns whether the run is finished.
    """
    run = load_run(folder / "run.yaml")
    told_step = files.last_line(folder / "metrics.jsonl")
    told_at, shown = 0.0, dict[int, str]()
    while True:
        over = _are_over(folder, jobs)
        for entry in journal.read_attempts(folder)[since:]:
            said = _describe(entry)
            if shown.get(entry["attempt"]) != said:
                shown[entry["attempt"]] = said
                on_line(said)
        step = files.last_line(folder / "metrics.jsonl")
        if step is not None and step != told_step and (over or time.monotonic() > told_at + SECONDS_BETWEEN_LINES):
            told_step, told_at = step, time.monotonic()
            on_line(_progress(run, step))
        if over:
            journal.settle(folder)
            return is_finished(folder)
        time.sleep(0.5 if len(jobs) == 1 else 2)


def _are_over(folder: Path, jobs: list[Any]) -> bool:
    """A local job knows; of Slurm's, the queue does, not submitit, which would ask accounting."""
    if (folder / "jobs.json").exists():
        return not submitted.queued(folder)
    return all(job.done() for job in jobs)


def _describe(entry: journal.Entry) -> str:
    if entry["outcome"]:
        durable = entry["signal_to_durable"]
        quick = f" ({durable:.1f} s from signal to durable)" if durable is not None else ""
        return f"attempt {entry['attempt']} {entry['outcome']}: {entry['reason']}{quick}"
    return f"attempt {entry['attempt']} started: job {entry['job']}, {entry['ranks']} ranks"


def _progress(run: Run, step: dict[str, Any]) -> str:
    phase = next(phase for phase in run.phases if phase.name == step["phase"])
    done = step["tokens"] / derive.total_tokens(run)
    rate = derive.tokens_per_step(phase) / step["seconds"]
    return (
        f"{done:4.0%}  {step['phase']} step {step['step'] + 1}/{derive.phase_steps(phase)}  "
        f"loss {step['loss']:.3f}  {rate:,.0f} tokens/s"
    )


def with_absolute_paths(run: Run) -> Run:
    """The run with absolute paths: the job may start in another folder."""

    def resolved(named: dict[str, str]) -> dict[str, str]:
        return {name: str(Path(path).resolve()) for name, path in named.items()}

    data = run.data
    return run.model_copy(
        update={
            "start_from": run.start_from and str(Path(run.start_from).resolve()),
            "data": data.model_copy(
                update={
                    "tokenizer": str(Path(data.tokenizer).resolve()),
                    "sources": resolved(data.sources),
                    "held_out": resolved(data.held_out),
                }
            ),
        }
    )


def _refuse_another(folder: Path, run: Run, sources: Sources) -> None:
    old = load_run(folder / "run.yaml")
    if derive.run_digest(old) != derive.run_digest(run):
        changes = ", ".join(_differences(old.model_dump(mode="json"), run.model_dump(mode="json"))[:3])
        raise RunError(f"{folder}: holds a run with another config ({changes}); choose another name, or that config")
    begun = files.read_json(folder / "plan.json")["sources"]
    for name, info in sources.training.items():
        if name in begun and begun[name]["digest"] != info.digest:
            raise RunError(f"{folder}: was begun with another store for {name!r}; choose another name, or that store")


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Paths at which two configs differ, with both values; the parts that may differ are left out."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [f"{where}: {old} there, {new} here"] if old != new else []
    keys = [key for key in {**old, **new} if where or key not in derive.MAY_CHANGE]
    return [
        line
        for key in keys
        for line in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    ]


def _refuse_running(folder: Path) -> None:
    journal.settle(folder)
    running = [entry["job"] for entry in journal.read_attempts(folder) if entry["outcome"] is None]
    with contextlib.suppress(SlurmError):
        running += sorted({job.array for job in submitted.queued(folder)})
    if running:
        raise RunError(
            f"{folder}: job {running[0]} is at work on this run, or queued; watch it with: crystal status {folder}"
        )


@contextlib.contextmanager
def _detached() -> Iterator[None]:
    """Lets processes started here survive Ctrl-C and the end of the terminal, which would reach them too."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
