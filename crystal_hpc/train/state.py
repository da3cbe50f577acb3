"""Where a run stands: the phase, and the steps of it that are done. Everything else about a run follows from that."""

from dataclasses import asdict, dataclass
from typing import Any

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run


@dataclass(frozen=True, order=True)
class Position:
    """`step` steps of phase number `phase` are done; the next step to run is number `step`, counted from zero."""

    phase: int
    step: int

    def after_step(self) -> "Position":
        return Position(self.phase, self.step + 1)

    def next_phase(self) -> "Position":
        return Position(self.phase + 1, 0)

    def tokens(self, run: Run) -> int:
        """Tokens that the run has trained on."""
        return derive.tokens_until(run, self.phase, self.step)

    def named(self, run: Run) -> dict[str, Any]:
        """As the journal, manifests and people write it: the phase by its name."""
        return {**asdict(self), "phase": run.phases[self.phase].name}

    @classmethod
    def from_named(cls, run: Run, named: dict[str, Any]) -> "Position":
        """The inverse of `named`; raises ValueError for a phase that the run does not have."""
        return cls([phase.name for phase in run.phases].index(named["phase"]), named["step"])
