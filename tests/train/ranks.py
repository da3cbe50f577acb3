"""Real ranks for tests: processes on gloo that train a run folder, many times over for one start-up.

Importing torch and Megatron takes seconds, so a group of ranks stays and takes one order after another: train this
folder with this layout, tell it to stop after so many steps, and say what was seen.
"""

import gc
import itertools
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crystal_hpc.train.preemption import Stop, StopFlag

PATIENCE = 240


# The looks at the flag in an undisturbed tiny run without held-out data: in each phase one when set-up is over, one at
# the end of each of its 5, 4 and 3 steps, and one at its end.
LOOKS = 18
STEPS = 12


def look_in_step(number: int) -> int:
    """The look at the end of step `number` (1 to 12) of the whole run."""
    return number + 1 + 2 * (number > 5) + 2 * (number > 9)


@dataclass
class Order:
    """One training job: a prepared run folder, and when a signal comes, if one does."""

    folder: Path
    signal_at_look: int | None = None
    """The signal is there from the n-th time on (1, 2, ...) that the loop looks at the flag: at the end of set-up, at
    the end of each step, at each micro-batch of an evaluation, at the end of a phase."""
    signal_rank: int = 0
    """The one rank that gets the signal."""
    overrides: tuple[str, ...] = ()
    meeting: str = ""
    """Name of the file in which the ranks of this job find each other."""


@dataclass
class Seen:
    """What a job did, as rank 0 saw it, and the weights it ended with."""

    stop: str
    position: tuple[int, int]
    losses: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)


class Ranks:
    """A group of waiting processes."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._numbers = itertools.count()
        self._orders = [context.Queue() for _ in range(size)]
        self._answers = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, size, self._orders[rank], self._answers), daemon=True)
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def train(self, order: Order) -> Seen:
        """Has all ranks train; returns what rank 0 saw. Raises what any rank raised."""
        order = replace(order, meeting=f"meeting-{next(self._numbers)}-{len(self._orders)}")
        for queue in self._orders:
            queue.put(order)
        answers = [self._answers.get(timeout=PATIENCE) for _ in self._orders]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        seen: Seen = next(answer for answer in answers if answer is not None)
        return seen

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """A group of ranks for the length of a block."""
    group = Ranks(size)
    try:
        yield group
    finally:
        group.close()


class _FlagAtLook(StopFlag):
    """A flag that is raised between two given looks at it, so that a test can choose the moment of the signal."""

    def __init__(self, look: int | None) -> None:
        self._looks, self._raised_at = 0, look
        super().__init__()

    @property
    def stop(self) -> Stop:
        self._looks += 1
        return Stop.TIME_LIMIT if self._raised_at and self._looks >= self._raised_at else Stop.NO

    @stop.setter
    def stop(self, _value: Stop) -> None:
        """Only `look` decides."""


def _serve(rank: int, size: int, orders: Any, answers: Any) -> None:
    while True:
        order = orders.get()
        try:
            answers.put(_train(order, rank, size))
        except BaseException as error:  # told to the test, which raises it
            import traceback

            traceback.print_exc()
            answers.put(RuntimeError(f"rank {rank}: {error!r}"))
        gc.collect()  # of models, and with them of process groups, each of which has threads that look around all day


def _train(order: Order, rank: int, size: int) -> Seen | None:
    from crystal_hpc import files
    from crystal_hpc.config.load import load_run
    from crystal_hpc.jobs import training
    from crystal_hpc.model import parallel
    from crystal_hpc.train import loop

    run = load_run(order.folder / "run.yaml", order.overrides)
    lines_before = sum(1 for _ in files.read_lines(order.folder / "metrics.jsonl"))
    flag = _FlagAtLook(order.signal_at_look if rank == order.signal_rank else None)
    layout = parallel.start(run, rank, size, rank, order.folder / order.meeting)
    session = training.Session(run, order.folder, training.read_sources(run), layout)
    job = session.job(flag, 1, lambda *_: None)
    ended = loop.train(job)
    job.metrics.close()
    kept = _weights(job.trainer)
    session.stop()
    if rank != 0:
        return None
    lines = list(files.read_lines(order.folder / "metrics.jsonl"))[lines_before:]
    position = (ended.position.phase, ended.position.step)
    return Seen(ended.stop.name, position, [x["loss"] for x in lines], [x["digest"] for x in lines], kept)


def _weights(trainer: Any) -> dict[str, Any]:
    """Parameters and optimizer state of this rank, as numpy arrays by name."""
    from crystal_hpc.train import optim, sharding

    found = {name: p.detach().float().cpu().numpy().copy() for name, p in sharding.module(trainer).named_parameters()}
    for inner in optim._inner_optimizers(trainer.optimizer):
        for number, state in enumerate(inner.state.values()):
            found.update({f"optimizer.{number}.{key}": value.cpu().numpy().copy() for key, value in state.items()})
    return found
