"""The drill itself: one undisturbed run for reference, then rounds of the same run with fault upon fault.

A round is a whole run. Each of its faults waits for its moment (a step, a start-up, a save), is injected, and is over
when the run has taken a new step. A run that a fault has taken out of the queue is taken up again as a user would, with
`crystal resume`. At its end every tensor and every sample is compared with the reference.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Cluster
from crystal_hpc.drill import compare, faults, recipe
from crystal_hpc.errors import ConfigError, CrystalError, RunError, SlurmError
from crystal_hpc.jobs import journal, slurm, submit, submitted
from crystal_hpc.jobs.status import cancel

MOMENTS = ("step", "start-up", "save")
PATIENCE = 600.0
MOST_FRUITLESS = 3
Tell = Callable[[str], None]


@dataclass
class Outcome:
    """One fault and what became of it."""

    round: int
    fault: str
    moment: str
    redone: int | None = None
    """Steps that had to be done again."""
    durable: float | None = None
    """Seconds from the first signal to the durable checkpoint; None where the fault leaves no time to save."""
    back: float | None = None
    """Seconds from the fault to the first new step, waiting in the queue included."""
    by_hand: bool = False
    """Whether the run had to be submitted again."""
    verdict: str = "?"


@dataclass
class Drill:
    """Settings of a drill, and where it happens."""

    cluster: Cluster
    folder: Path
    names: list[str]
    """Faults to draw from."""
    seed: int = 1
    count: int = 10
    per_round: int = 4
    urgent: str | None = None
    devcluster: Path | None = None
    tell: Tell = print
    outcomes: list[Outcome] = field(default_factory=list)
    _refusal: str = "each time its job had ended just before"

    def run(self) -> list[Outcome]:
        """Runs all rounds. Raises RunError if the undisturbed run does not finish."""
        recipe.make_data(self.folder / "data")
        chance = random.Random(self.seed)
        deck: list[str] = []
        number = fruitless = 0
        while len(self.outcomes) < self.count:
            number += 1
            planned: list[str] = []
            while len(planned) < min(self.per_round, self.count - len(self.outcomes)):
                if not deck:  # every fault comes before any comes again
                    deck = chance.sample(self.names, len(self.names))
                planned.append(deck.pop())
            left = self._round(number, planned, chance)
            deck += left  # the run was over before they could be injected
            fruitless = 0 if len(left) < len(planned) else fruitless + 1
            if fruitless == MOST_FRUITLESS:
                raise RunError(f"{left[0]}: could not be injected in {fruitless} runs; {self._refusal}")
        return self.outcomes

    def _reference(self, long: bool) -> Path:
        run = recipe.make_run(self.folder / "data", "reference-long" if long else "reference", self.cluster, long)
        folder = submit.prepare(run, self.cluster, self.folder / "runs")
        if not submit.is_finished(folder):
            self.tell("the undisturbed run, for reference" + (", with a long phase" if long else ""))
            submit.start(folder, self.cluster)
            _wait(lambda: not submitted.queued(folder), "the undisturbed run")
        if not submit.is_finished(folder):
            raise RunError(f"{folder}: the undisturbed run did not finish; see: crystal status {folder}")
        return folder

    def _round(self, number: int, planned: list[str], chance: random.Random) -> list[str]:
        """A run with these faults in it; returns those for which it did not last."""
        long = bool(faults.SLOW & set(planned))
        reference = self._reference(long)
        run = recipe.make_run(self.folder / "data", f"round-{number:03d}", self.cluster, long)
        files.remove_folder(self.folder / "runs" / run.name)
        folder = submit.prepare(run, self.cluster, self.folder / "runs")
        submit.start(folder, self.cluster)
        mine: list[Outcome] = []
        try:
            while planned:
                outcome = Outcome(number, planned[0], "")
                if not self._disturb(folder, outcome, chance):
                    break
                mine.append(outcome)
                planned = planned[1:]
            self._finish(folder)
            found = compare.differences(folder, reference)
        except CrystalError as error:
            found = [str(error).splitlines()[0]]
            mine.append(outcome)
            planned = planned[1:]
            cancel(folder)
        for outcome in mine:
            outcome.verdict = found[0] if found else "bit-equal"
        self.outcomes += mine
        self.tell(f"round {number}: {', '.join(o.fault for o in mine)}: {'; '.join(found) or 'bit-equal'}")
        return planned

    def _moment(self, name: str, chance: random.Random) -> str:
        return "step" if name in faults.NEEDS_RANKS | faults.SLOW else chance.choice(MOMENTS)

    def _disturb(self, folder: Path, outcome: Outcome, chance: random.Random) -> bool:
        """Injects a fault until it has hit an attempt; False if the run finishes first."""
        while True:
            outcome.moment = self._moment(outcome.fault, chance)
            target = self._wait_for_moment(folder, outcome, chance)
            if target is None:
                return False
            injected = time.time()
            try:
                faults.FAULTS[outcome.fault](target)
            except SlurmError as error:  # the job had ended just before
                self._refusal = str(error)
                continue
            self._recover(folder, outcome, injected)
            hit = [entry for entry in journal.read_attempts(folder) if entry["job"] == target.job]
            ended = [entry for entry in hit if entry["ended"] is not None and entry["outcome"] != "finished"]
            if any(entry["ended"] > injected for entry in ended):
                return True  # else it came before there was a rank, or after the phase was done

    def _wait_for_moment(self, folder: Path, outcome: Outcome, chance: random.Random) -> faults.Target | None:
        """The job to disturb, once its moment has come; None if the run finished first."""
        if outcome.moment == "start-up":
            delay = chance.uniform(0.3, 4)
            outcome.moment = f"start-up +{delay:.1f} s"
            job = self._wait_for_start(folder)
            time.sleep(delay)
            return self._target(folder, job, chance)
        steps = chance.randint(3, 20)
        # A slow fault needs what is left of the long phase.
        reached = max(_steps(folder), recipe.STEPS["prose"] if outcome.fault in faults.SLOW else 0) + steps
        saving = outcome.moment == "save"
        outcome.moment = f"{'save after ' if saving else ''}step {reached}"

        def ready() -> bool:
            if submit.is_finished(folder):
                return True
            open_ones = [entry for entry in journal.read_attempts(folder) if entry["outcome"] is None]
            trained = _steps(folder) >= reached and bool(open_ones) and len(open_ones[-1]["pids"]) > 1
            return trained and (not saving or any(folder.glob("checkpoints/*/*.pending")))

        _wait(ready, f"step {reached}", every=0.005, idle=lambda: self._resume_if_gone(folder, outcome))
        return None if submit.is_finished(folder) else self._target(folder, None, chance)

    def _wait_for_start(self, folder: Path) -> str:
        """A job that has begun in the last moments: the next that does."""
        seen = {(job.job, job.start) for job in submitted.queued(folder) if job.state == "RUNNING"}

        def begun() -> str | None:
            running = [job for job in submitted.queued(folder) if job.state == "RUNNING"]
            new = [job.job for job in running if (job.job, job.start) not in seen]
            return new[0] if new else ("" if submit.is_finished(folder) else None)

        return str(_wait(begun, "a job to start", every=0.1))

    def _target(self, folder: Path, job: str | None, chance: random.Random) -> faults.Target | None:
        if job == "":
            return None
        entries = [entry for entry in journal.read_attempts(folder) if entry["outcome"] is None]
        name = job or entries[-1]["job"]
        nodes = slurm.command("scontrol", "show", "hostnames", slurm.job_fields(name).get("NodeList", "")).split()
        entry = entries[-1] if entries else None
        return faults.Target(name, nodes, entry, chance, self.urgent, self.devcluster)

    def _recover(self, folder: Path, outcome: Outcome, injected: float) -> None:
        """Waits for a step taken by an attempt that began after the fault, or for the end of the run."""

        def is_back() -> bool:
            fresh = [entry for entry in journal.read_attempts(folder) if entry["started"] > injected]
            return any("first_step" in entry["startup"] for entry in fresh) or submit.is_finished(folder)

        def idle() -> None:
            self._resume_if_gone(folder, outcome)
            if outcome.fault in faults.SLOW:
                waiting = [job.job for job in submitted.queued(folder) if job.state in slurm.WAITING]
                faults.lengthen(waiting, self.cluster.time_limit)

        _wait(is_back, f"the run to go on after {outcome.fault}", idle=idle)
        faults.revive_nodes(self.devcluster)
        fresh = [entry for entry in journal.read_attempts(folder) if entry["started"] > injected]
        hit = [entry for entry in journal.read_attempts(folder) if entry["started"] <= injected][-1:]
        outcome.durable = next((entry["signal_to_durable"] for entry in hit if entry["signal_to_durable"]), None)
        first = next((entry for entry in fresh if "first_step" in entry["startup"]), None)
        if first:
            outcome.redone = first["redone_steps"]
            outcome.back = first["started"] + sum(list(first["startup"].values())[1:]) - injected

    def _resume_if_gone(self, folder: Path, outcome: Outcome | None) -> None:
        """Takes the run up again if nothing of it is in the queue any more."""
        faults.revive_nodes(self.devcluster)
        if submitted.queued(folder) or submit.is_finished(folder):
            return
        if outcome:
            outcome.by_hand = True
        _, cluster = submit.reopen(folder, None)
        submit.start(folder, cluster)

    def _finish(self, folder: Path) -> None:
        _wait(
            lambda: submit.is_finished(folder) and not submitted.queued(folder),
            "the run to finish",
            idle=lambda: self._resume_if_gone(folder, None),
        )


def drill(
    cluster: Cluster,
    folder: Path,
    names: list[str] | None,
    seed: int,
    count: int,
    per_round: int,
    devcluster: Path | None,
    tell: Tell,
) -> int:
    """Runs a drill, tells its table, and returns how many faults had an effect on the result. Raises CrystalError."""
    if cluster.executor != "slurm":
        raise ConfigError("executor: the drill is for Slurm; this profile says local", f"cluster {cluster.name}")
    urgent = faults.preempting_partition(cluster.slurm.partition)
    possible = faults.possible(urgent, devcluster)
    unknown = sorted(set(names or []) - set(possible))
    if unknown:
        raise RunError(f"faults {', '.join(unknown)}: not possible here; choose from {', '.join(possible)}")
    work = Drill(cluster, folder, names or possible, seed, count, per_round, urgent, devcluster, tell)
    outcomes = work.run()
    for line in table(outcomes):
        tell(line)
    good = sum(outcome.verdict == "bit-equal" for outcome in outcomes)
    tell(f"{good} of {len(outcomes)} bit-equal")
    return len(outcomes) - good


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """The drill's result, a line for each fault."""
    yield f"{'round':>5}  {'fault':<12}{'moment':<22}{'redone':>7}{'durable s':>11}{'back s':>8}  verdict"
    for outcome in outcomes:
        redone = "-" if outcome.redone is None else str(outcome.redone)
        durable = "-" if outcome.durable is None else f"{outcome.durable:.1f}"
        back = "-" if outcome.back is None else f"{outcome.back:.1f}"
        hand = " (resumed by hand)" if outcome.by_hand else ""
        yield (
            f"{outcome.round:>5}  {outcome.fault:<12}{outcome.moment:<22}{redone:>7}{durable:>11}{back:>8}  "
            f"{outcome.verdict}{hand}"
        )


def _steps(folder: Path) -> int:
    """Steps that the run has done, by its metrics."""
    last = files.last_line(folder / "metrics.jsonl")
    if last is None:
        return 0
    run = load_run(folder / "run.yaml")
    steps = {phase.name: derive.phase_steps(phase) for phase in run.phases}
    names = list(steps)
    return sum(steps[name] for name in names[: names.index(last["phase"])]) + int(last["step"]) + 1


def _wait(condition: Callable[[], Any], what: str, every: float = 0.2, idle: Callable[[], None] | None = None) -> Any:
    """The first true (or empty, but not None or False) answer; raises RunError after PATIENCE seconds."""
    deadline, next_idle = time.monotonic() + PATIENCE, time.monotonic() + 5
    while time.monotonic() < deadline:
        answer = condition()
        if answer or answer == "":
            return answer
        if idle and time.monotonic() > next_idle:
            idle()
            next_idle = time.monotonic() + 5
        time.sleep(every)
    raise RunError(f"waited {PATIENCE:.0f} s in vain for {what}")
