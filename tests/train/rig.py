"""Ranks that a test may kill: each is a process of its own, forked from a server that has torch and Megatron loaded.

Starting Python with torch and Megatron costs seconds, a fork of a process that has them costs little; so every case of
a test can have fresh ranks, which it may kill at any moment. `run_ranks` starts them, `train` is what most of them do.
"""

import itertools
import logging
import multiprocessing
import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crystal_hpc.train.preemption import StopFlag

PATIENCE = 400
LOG = "log.txt"
"""In the run folder: what rank 0 logged, over all attempts."""

_numbers = itertools.count()
# Importing Megatron asks CUDA what there is, after which a process cannot be forked and use a GPU.
_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["crystal_hpc.jobs.training", "crystal_hpc.train.loop", "torch._dynamo", "torch.utils.tensorboard", "pytest"]
)


@dataclass
class Ended:
    """How a rank ended: its exit code (negative: the signal that killed it), and what it returned or raised."""

    code: int
    value: Any = None
    error: BaseException | None = None


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Ended]:
    """Calls `function(rank, size, meeting, *arguments)` in so many processes and waits for their ends.

    `meeting` names a file by which they may find each other.
    """
    meeting = f"meeting-{os.getpid()}-{next(_numbers)}"
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _context.Process(target=_serve, args=(pipes[rank][1], function, rank, size, meeting, arguments), daemon=True)
        for rank in range(size)
    ]
    for process, (_, far) in zip(processes, pipes, strict=True):
        process.start()
        far.close()
    ended = []
    for process, (near, _) in zip(processes, pipes, strict=True):
        value, error = None, None
        try:
            if not near.poll(PATIENCE):
                raise TimeoutError(f"a rank of {function.__name__} has not ended in {PATIENCE} s")
            value, error = pickle.loads(near.recv_bytes())
        except EOFError:  # killed
            pass
        process.join(PATIENCE)
        ended.append(Ended(process.exitcode or 0, value, error))
    return ended


def values(ended: Sequence[Ended]) -> list[Any]:
    """What the ranks returned; raises what one of them raised."""
    for one in ended:
        if one.error:
            raise one.error
    assert [one.code for one in ended] == [0] * len(ended)
    return [one.value for one in ended]


def _serve(pipe: Any, function: Callable[..., Any], rank: int, size: int, meeting: str, arguments: Any) -> None:
    value, error = None, None
    try:
        value = function(rank, size, meeting, *arguments)
    except BaseException as raised:
        traceback.print_exc()
        error = raised
    try:
        told = pickle.dumps((value, error))
    except Exception:
        told = pickle.dumps((None, RuntimeError(repr(error or value))))
    pipe.send_bytes(told)
    pipe.close()
    os._exit(0 if error is None else 1)  # the groups of ranks that died cannot be left in good order


@dataclass
class Trained:
    """What one rank's attempt came to."""

    stop: str
    began: tuple[int, int]
    """(phase, step)"""
    ended: tuple[int, int]
    events: list[tuple[str, int, int]]
    """(what, phase, step) in order; `saved` once a state is durable."""
    losses: list[float]


def train(
    rank: int,
    size: int,
    meeting: str,
    folder: Path,
    overrides: Sequence[str] = (),
    prepare: Callable[..., None] | None = None,
    *more: Any,
) -> Trained:
    """One attempt at a run; `prepare(job, *more)` is called before it and may break things in this process."""
    from crystal_hpc.log import log
    from crystal_hpc.train import loop

    session, job = attempt(rank, size, meeting, folder, overrides)
    events: list[tuple[str, int, int]] = []
    job.on_event = lambda event, at: events.append((event, at.phase, at.step))
    if prepare:
        prepare(job, *more)
    if rank == 0:
        log.addHandler(logging.FileHandler(folder / LOG))
    before = _steps_in(folder)
    ended = loop.train(job)
    job.metrics.close()
    began = next((phase, step) for event, phase, step in events if event == "started")
    lines = _losses(folder)[before:] if rank == 0 else []
    return Trained(ended.stop.name, began, (ended.position.phase, ended.position.step), events, lines)


def attempt(rank: int, size: int, meeting: str, folder: Path, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """This process as a rank of a job on a run folder: session and job."""
    from crystal_hpc.config.load import load_run
    from crystal_hpc.jobs import training
    from crystal_hpc.model import parallel

    run = load_run(folder / "run.yaml", tuple(overrides))
    layout = parallel.start(run, rank, size, rank, folder / meeting)
    session = training.Session(run, folder, training.read_sources(run), layout)
    return session, session.job(StopFlag(), 1, lambda *_: None)


def join(rank: int, size: int, meeting: str, folder: Path, overrides: Sequence[str] = ()) -> Any:
    """This process as a rank with a model and an optimizer, and no data: a trainer. It writes to no run folder."""
    from crystal_hpc.config.load import load_run
    from crystal_hpc.model import parallel
    from crystal_hpc.train.step import build_trainer

    run = load_run(folder / "run.yaml", tuple(overrides))
    place = Path(tempfile.gettempdir(), meeting)
    return build_trainer(run, parallel.start(run, rank, size, rank, place))


def _losses(folder: Path) -> list[float]:
    from crystal_hpc import files

    return [line["loss"] for line in files.read_lines(folder / "metrics.jsonl") if "loss" in line]


def _steps_in(folder: Path) -> int:
    return len(_losses(folder))


SHORT = (
    "phases=[{name: prose, sequence_length: 16, batch_size: 8, steps: 4, mixture: {prose: 1.0}, checkpoint_every: 1, "
    "learning_rate: {peak: 0.01, warmup_steps: 1, end: 0.001}}]",
    "checkpoints.keep_last=9",
)
"""Overrides that make a run of one phase, with a checkpoint after each of its four steps."""


def generation(folder: Path, step: int, phase: str = "prose") -> Path:
    return folder / "checkpoints" / phase / f"step_{step:08d}"


def steps_saved(folder: Path) -> list[str]:
    """What lies in a run's folder of checkpoints: `prose/step_00000002`."""
    return sorted(f"{path.parent.name}/{path.name}" for path in (folder / "checkpoints").glob("*/*"))


def state_saved(place: Path) -> dict[str, str]:
    """The digests of the files that hold a generation's tensors: equal for equal states under one layout."""
    from crystal_hpc.train.manifest import read_manifest

    return {name: entry.xxh3 for name, entry in read_manifest(place).files.items() if name.endswith(".distcp")}


def branch(origin: Path, to: Path, last_step: int) -> Path:
    """A copy of a short run as it was after a step, with the generations until then."""
    later = [f"step_{step:08d}" for step in range(last_step + 1, 5)]
    shutil.copytree(origin, to, ignore=shutil.ignore_patterns(*later, "meeting-*", "metrics.jsonl", "tensorboard"))
    return to


_short_runs: dict[tuple[int, tuple[str, ...]], Path] = {}


def short_run(new_run: Callable[..., Path], size: int = 1, *overrides: str) -> Path:
    """A finished short run to which nothing happened, with all its generations; made once, and only to be copied."""
    if (size, overrides) not in _short_runs:
        distributed = f"parallel.distributed_optimizer={'true' if size > 1 else 'false'}"
        folder = new_run("undisturbed", *SHORT, distributed, *overrides)
        values(run_ranks(train, size, folder, ["checkpoints.asynchronous=false"]))
        _short_runs[size, overrides] = folder
    return _short_runs[size, overrides]


def forge(place: Path, **changes: Any) -> None:
    """Has a generation's manifest vouch for the files as they are now, and say something else of them."""
    from crystal_hpc import files
    from crystal_hpc.train.manifest import FileEntry, read_manifest

    manifest = read_manifest(place)
    entries = {
        name: FileEntry((place / name).stat().st_size, files.digest_file(place / name)) for name in manifest.files
    }
    replace(manifest, **{"files": entries} | changes).write(place)


def unlike(parts: Sequence[Any], reference: Path, instead: Callable[[str], str] = lambda key: key) -> list[str]:
    """The keys of a rank's parts that are not, bit for bit, what a generation holds; `instead`: of another key."""
    import torch

    from crystal_hpc.train.distcp import Reader, Request

    reader, targets = Reader(reference), [torch.empty_like(part.tensor) for part in parts]
    reader.read([Request(instead(part.key), part.offset, target) for part, target in zip(parts, targets, strict=True)])
    return [part.key for part, target in zip(parts, targets, strict=True) if not torch.equal(part.tensor, target)]
