"""The whole of a training job, from the newest checkpoint to the end of the run or a signal. Read this first.

    position = newest checkpoint, or the start
    for each phase from there on:
        for each step: batch -> forward, backward, update -> one line of metrics
            told to stop (all ranks agree at the step boundary)? save, and leave
            time for a checkpoint? begin one, which is written while training goes on
        save; evaluate on held-out data

Nothing here depends on how the job was started, how many ranks there are, or how often it was interrupted: the batch of
a step, the learning rate and the initial weights are functions of the config.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.config.units import format_count
from crystal_hpc.data.batches import PhaseBatches
from crystal_hpc.data.fim import PhaseFim, load_fims
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.preparing import PreparedRows
from crystal_hpc.data.rows import RowSource
from crystal_hpc.errors import RunError
from crystal_hpc.log import log
from crystal_hpc.train import measure, optim
from crystal_hpc.train.checkpoint import Saver
from crystal_hpc.train.evaluate import evaluate_phase
from crystal_hpc.train.manifest import Why
from crystal_hpc.train.metrics import Metrics
from crystal_hpc.train.preemption import Stop, StopFlag
from crystal_hpc.train.restore import load_latest
from crystal_hpc.train.state import Position
from crystal_hpc.train.step import StepResult, Trainer, train_step

WHY: dict[Stop, Why] = {Stop.TIME_LIMIT: "time limit", Stop.PREEMPTED: "preempted"}


@dataclass
class Job:
    """One attempt at a run: what it works on, what it was told, and who wants to hear of it."""

    run: Run
    folder: Path
    trainer: Trainer
    flag: StopFlag
    sources: Mapping[str, RowSource]
    held_out: Mapping[str, RowSource]
    metrics: Metrics
    on_event: Callable[[str, Position], None] = lambda _event, _position: None
    """Told `started` with where it stands, `step` after each step, `saving` and `saved`; the journal listens."""
    beat: Callable[..., None] = lambda _doing, step=False: None
    """Told what begins now, and whether it is a step; the watchdog listens."""
    last_phase: int | None = None
    """The phase with which the job ends; None for the run's last."""
    prepared: Callable[[int], PreparedRows | None] = lambda _phase: None
    """Opens what a node's own disk may have of a phase's rows (by the phase's place in the run)."""
    evaluates: bool = True
    """Whether this job computes the held-out losses at the end of a phase."""

    @property
    def layout(self) -> Any:
        return self.trainer.layout

    def stop_agreed(self) -> Stop:
        """The strongest reason to stop that any rank knows; a collective call."""
        votes = self.layout.comm.sum(_votes(self.flag.stop))
        return _strongest(votes)


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: `Stop.NO` at the end of the job's last phase."""

    stop: Stop
    position: Position


def train(job: Job) -> Ended:
    """Trains to the end of the job's last phase, or until told to stop; durable either way when it returns.

    Raises CrystalError where the state on disk cannot be used, or the loss is no longer a number.
    """
    job.beat("loading the newest checkpoint")
    position, loaded = load_latest(job.trainer, job.folder, lambda *_: job.beat("reading the newest checkpoint"))
    log.info("starting at phase %s, step %d", job.run.phases[position.phase].name, position.step)
    job.on_event("started", position)
    orders = run_orders(job.run, {name: source.info.tokens for name, source in job.sources.items()})
    fims = load_fims(job.run)
    saver = Saver(job.trainer, job.folder, orders, loaded)
    last_phase = len(job.run.phases) - 1 if job.last_phase is None else job.last_phase
    while True:
        stop, position = train_phase(job, saver, orders[position.phase], fims[position.phase], position)
        if stop is Stop.NO and job.evaluates:
            stop = _evaluate(job, position)
        if stop is not Stop.NO or position.phase >= last_phase:
            if stop is Stop.NO:
                saver.close()
            return Ended(stop, position)
        position = position.next_phase()


def train_phase(
    job: Job, saver: Saver, order: PhaseOrder, fim: PhaseFim | None, position: Position
) -> tuple[Stop, Position]:
    """The rest of one phase, and the checkpoint at its end. Returns where it got to, and why if that is not the end."""
    run, layout = job.run, job.layout
    phase = run.phases[position.phase]
    steps = derive.phase_steps(phase)
    if position.step == 0 and position.phase > 0 and phase.optimizer_state == "fresh":
        optim.reset_state(job.trainer.optimizer)
    share = phase.batch_size, run.parallel.micro_batch, layout.data_rank, layout.data_size
    batches = PhaseBatches(order, job.sources, *share, fim, job.prepared(position.phase))
    stop = job.stop_agreed()  # set-up is long; a signal during it ends the attempt before its first step
    while position.step < steps and stop is Stop.NO:
        job.beat(f"step {position.step} of phase {phase.name}", step=True)
        started = time.perf_counter()
        batch = batches.step(position.step)
        waited = time.perf_counter() - started
        rate = derive.learning_rate(phase, position.step)
        votes = [*_votes(job.flag.stop), saver.vote(), int(saver.is_asked_for())]
        result = train_step(job.trainer, batch, rate, votes, saver.before_update)
        _record(job, saver, position, result, rate, time.perf_counter() - started, waited)
        position = position.after_step()
        stop, (ready, asked) = _strongest(result.votes), result.votes[2:]
        if ready == layout.comm.size:
            _advance_save(job, saver)
        if position.step == steps:
            _save(job, saver, position, "phase end")
        elif stop is not Stop.NO:
            _save(job, saver, position, WHY[stop])
        elif asked or (phase.checkpoint_every and position.step % phase.checkpoint_every == 0):
            _begin_save(job, saver, position)
    batches.close()
    return stop, position


def _record(
    job: Job, saver: Saver, position: Position, result: StepResult, rate: float, seconds: float, waited: float
) -> None:
    """One line of metrics; a loss that is no longer a number ends the attempt before it can be saved."""
    run, phase = job.run, job.run.phases[position.phase]
    done = position.after_step()
    if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
        saver.finish()  # the state of an earlier step, which was good
        raise RunError(
            f"the loss is {result.loss} and the gradient norm {result.grad_norm} in step {position.step} of phase "
            f"{phase.name}; the last checkpoint is kept: look at the data of this step, or lower the learning rate"
        )
    speed = measure.speed(run, phase, job.layout.comm.size, seconds)
    measured = dict(result.measured)
    if measured:
        measured["other"] = max(seconds - waited - sum(measured[part] for part in measure.PARTS), 0.0)
    job.metrics.step(
        phase.name,
        position.step,
        _total_steps(run, done),
        {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": done.tokens(run),
            "seconds": seconds,
            "wait": waited,
            **measured,
            **speed,
            "digest": f"{result.digest:016x}",
        },
    )
    job.on_event("step", position)
    log.info(
        "%s step %d/%d loss %.4f lr %.3g %s tokens %.0f tokens/s%s",
        phase.name,
        done.step,
        derive.phase_steps(phase),
        result.loss,
        rate,
        format_count(done.tokens(run)),
        speed["tokens_per_second"],
        f" MFU {speed['mfu']:.1%}" if "mfu" in speed else "",
    )


def _evaluate(job: Job, position: Position) -> Stop:
    def should_stop() -> bool:
        job.beat("evaluating")
        return bool(job.stop_agreed())

    losses = evaluate_phase(job.trainer, job.folder, job.held_out, position, should_stop)
    job.metrics.held_out(_total_steps(job.run, position), losses)
    return job.stop_agreed()


def _save(job: Job, saver: Saver, position: Position, why: Why) -> None:
    """Returns when the state is durable."""
    job.beat(f"saving step {position.step}")
    job.on_event("saving", position)
    started = time.perf_counter()
    saver.save(position, why)
    log.info("saved step %d (%s) in %.2f s", position.step, why, time.perf_counter() - started)
    job.on_event("saved", position)
    job.beat("going on after a save")


def _begin_save(job: Job, saver: Saver, position: Position) -> None:
    """Returns at once, or when an earlier save is done that is still being written."""
    job.beat(f"beginning to save step {position.step}")
    job.on_event("saving", position)
    started = time.perf_counter()
    _told(job, saver.begin(position))
    log.info(
        "a save of step %d has begun; training stood still for %.2f s", position.step, time.perf_counter() - started
    )


def _advance_save(job: Job, saver: Saver) -> None:
    """All ranks have done what was next of the save under way."""
    if saver.under_way:
        job.on_event("saving", saver.under_way)
    _told(job, saver.advance())


def _told(job: Job, durable: Position | None) -> None:
    if durable:
        log.info("saved step %d of phase %s", durable.step, job.run.phases[durable.phase].name)
        job.on_event("saved", durable)


def _total_steps(run: Run, position: Position) -> int:
    return sum(derive.phase_steps(phase) for phase in run.phases[: position.phase]) + position.step


def _votes(stop: Stop) -> list[int]:
    """One vote for each reason to stop, so that the sum over ranks keeps them apart."""
    return [int(stop is Stop.TIME_LIMIT), int(stop is Stop.PREEMPTED)]


def _strongest(votes: list[int]) -> Stop:
    if votes[1]:
        return Stop.PREEMPTED
    return Stop.TIME_LIMIT if votes[0] else Stop.NO
