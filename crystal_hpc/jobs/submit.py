"""From a run and a cluster to a started job: checks everything that can be checked, freezes the run folder, submits.

`prepare` makes (or recognises) the run folder, `start` hands the job to submitit, `follow` watches it. All three leave
a folder that the same command picks up again.
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
from crystal_hpc.config.load import check_layout, dump_yaml, load_run
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.data.sources import Sources, read_sources
from crystal_hpc.errors import RunError
from crystal_hpc.jobs import journal
from crystal_hpc.jobs.request import executor_parameters
from crystal_hpc.report.plan import make_plan
from crystal_hpc.train.preemption import held_back

Event = Callable[[str], None]
# submitit stops requeueing after 3 timeouts by default, and takes preemption for one; how long to go on is not its say.
MANY = 10**6
SECONDS_BETWEEN_LINES = 3.0


def prepare(run: Run, cluster: Cluster, runs: Path) -> Path:
    """The run's folder, with run.yaml and plan.json in it. Raises CrystalError if the run cannot work here.

    A folder that exists is taken up again if it holds the same run; the parallel layout may differ.
    """
    check_layout(run, cluster)
    run = _absolute(run)
    sources = read_sources(run)
    folder = (runs / run.name).resolve()
    if (folder / "run.yaml").exists():
        _refuse_another(folder, run, sources)
        _refuse_running(folder)
    for part in ("attempts", "logs", "checkpoints"):
        files.make_folder(folder / part)
    if not (folder / "plan.json").exists():
        files.write_json(folder / "plan.json", make_plan(run, sources))
    files.write_file(folder / "run.yaml", dump_yaml(run))
    return folder


def is_finished(folder: Path) -> bool:
    """Whether the run in a prepared folder has nothing left to do."""
    return any(entry["outcome"] == "finished" for entry in journal.read_attempts(folder))


def start(folder: Path, cluster: Cluster) -> Any:
    """Submits the training job of a prepared run; returns submitit's job. It outlives this process."""
    import submitit

    from crystal_hpc.jobs.task import TrainTask

    executor = submitit.LocalExecutor(folder / "logs", max_num_timeout=MANY)
    executor.update_parameters(**executor_parameters(cluster))
    # Held back from the first instruction of every rank on, through submitit's controller and its requeues. The
    # controller itself never lets them in: signals are for the ranks (`crystal cancel`).
    with _detached(), held_back(), _environment(cluster.environment), files.disk_errors(folder):
        return executor.submit(TrainTask(folder))


def follow(folder: Path, job: Any, since: int, on_line: Event) -> journal.Entry | None:
    """Watches a job until it is over, telling each new step, and each attempt after the first `since` ones.

    Returns the last attempt, None if none was ever recorded.
    """
    run = load_run(folder / "run.yaml")
    told_step = files.last_line(folder / "metrics.jsonl")
    told_at, shown = 0.0, dict[int, str]()
    while True:
        over = job.done()
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
            return next(reversed(journal.read_attempts(folder)[since:]), None)
        time.sleep(0.5)


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


def _absolute(run: Run) -> Run:
    """The run with absolute paths: the job may start in another folder."""

    def resolved(named: dict[str, str]) -> dict[str, str]:
        return {name: str(Path(path).resolve()) for name, path in named.items()}

    data = run.data
    return run.model_copy(
        update={
            "data": data.model_copy(
                update={
                    "tokenizer": str(Path(data.tokenizer).resolve()),
                    "sources": resolved(data.sources),
                    "held_out": resolved(data.held_out),
                }
            )
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
    keys = [key for key in {**old, **new} if where or key not in ("parallel", "data")]
    return [
        line
        for key in keys
        for line in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    ]


def _refuse_running(folder: Path) -> None:
    journal.settle(folder)
    running = [entry for entry in journal.read_attempts(folder) if entry["outcome"] is None]
    if running:
        raise RunError(
            f"{folder}: job {running[-1]['job']} is at work on this run; watch it with: crystal status {folder}"
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
