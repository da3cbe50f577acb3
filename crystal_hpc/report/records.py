"""What a run folder holds, as plain records: `history` reads them, `chart`, `speed` and `html` show them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A step of a phase, counted from 0."""

    phase: str
    step: int

    def __str__(self) -> str:
        return f"{self.phase} {self.step:,}"


@dataclass(frozen=True)
class Share:
    """What a phase takes from one source."""

    samples: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class PlannedPhase:
    """A phase as the plan lays it out; `start` is the tokens that the run has seen before it."""

    name: str
    start: int
    steps: int
    tokens: int
    sources: dict[str, Share]

    def tokens_at(self, steps: int) -> int:
        """Tokens of the whole run once `steps` steps of this phase are done."""
        return self.start + self.tokens * steps // max(self.steps, 1)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of metrics.jsonl: loss in nats, `time` the unix second of its end; the rest are durations in seconds.

    What a line does not say is not-a-number: the parts of a step are measured only since there is `train.measure`, and
    `mfu` only where the peak of the device is known.
    """

    phase: str
    step: int
    attempt: int
    time: float
    loss: float
    grad_norm: float
    rate: float
    tokens: int
    seconds: float
    wait: float
    forward_backward: float
    gradient_sync: float
    save_wait: float
    optimizer: float
    mfu: float


@dataclass(frozen=True)
class Attempt:
    """One start of a job, as its journal entry tells it; times in unix seconds, durations in seconds."""

    number: int
    job: str
    host: str
    ranks: int | None
    started: float
    ended: float | None
    outcome: str | None
    reason: str
    first_step: Position | None
    last_step: Position | None
    signal: str | None
    signal_to_durable: float | None
    redone_steps: int
    startup: dict[str, float]
    commit: str | None
    backend: str
    versions: dict[str, str]

    @property
    def ending(self) -> str:
        """The outcome in words."""
        return (self.outcome or "not recorded").replace("_", " ")


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses (nats per token) by source, after `tokens` tokens of the run."""

    phase: str
    step: int
    tokens: int
    losses: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its size in bytes, and the seconds it took to save, beside training or not."""

    phase: str
    step: int
    tokens: int
    why: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Save:
    """A checkpoint that was made, and may be deleted since; `stood_still`: seconds that training waited for it."""

    phase: str
    step: int
    stood_still: float


@dataclass(frozen=True)
class Store:
    """A token store that the plan names."""

    path: str
    tokens: int
    digest: str
