"""Run folders as jobs would leave them, made up on disk: a real config and plan, invented numbers."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import dump_yaml
from crystal_hpc.config.schema import Run

START = 1_790_000_000.0
STORE_TOKENS = 10**6


def config(phases: Mapping[str, int], name: str = "demo") -> Run:
    """A small run with these phases (steps by name), two sources and two held-out stores."""
    rate = {"peak": 0.01, "warmup_steps": 3, "end": 0.001}
    shares = [{"prose": 0.95, "code": 0.05}, {"prose": 0.37, "code": 0.63}]
    return Run.model_validate(
        {
            "name": name,
            "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 512},
            "data": {
                "tokenizer": "tokenizer.json",
                "sources": {"prose": "stores/prose", "code": "stores/code"},
                "held_out": {"prose": "held_out/prose", "code": "held_out/code"},
            },
            "phases": [
                {"name": phase, "sequence_length": 64, "batch_size": 8, "steps": steps, "mixture": shares[index % 2],
                 "learning_rate": rate}
                for index, (phase, steps) in enumerate(phases.items())
            ],
        }
    )  # fmt: skip


class RunFolder:
    """A run folder and the ways to fill it; one step takes a second, of which a tenth is waiting for data."""

    def __init__(self, path: Path, phases: Mapping[str, int], name: str = "demo") -> None:
        self.path, self.run, self.clock = path, config(phases, name), START
        path.mkdir(parents=True)
        (path / "run.yaml").write_text(dump_yaml(self.run))
        self.write("plan.json", self._plan())

    def write(self, name: str, value: Any) -> None:
        """A JSON file anywhere in the folder."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(value))

    def steps(self, attempt: int, phase: str, first: int, last: int, **fields: Any) -> None:
        """Metrics lines of steps `first` to `last`; `fields` replace what they would say."""
        index = [found.name for found in self.run.phases].index(phase)
        with open(self.path / "metrics.jsonl", "a") as file:
            for step in range(first, last + 1):
                self.clock += 1.0
                tokens = derive.tokens_until(self.run, index, step + 1)
                noise = 0.15 * math.sin(step * 12.9898) * math.sin(step * 78.233 + index)
                line = {
                    "phase": phase, "step": step, "attempt": attempt, "time": self.clock,
                    "loss": 1.7 + 4.6 * (1 + tokens / 4000) ** -0.6 + noise + 0.3 * index * math.exp(-step / 9),
                    "grad_norm": 0.8, "lr": derive.learning_rate(self.run.phases[index], step), "tokens": tokens,
                    "seconds": 1.0, "wait": 0.1, "digest": "00",
                }  # fmt: skip
                file.write(json.dumps(line | fields) + "\n")

    def attempt(self, number: int, first: tuple[str, int], last: tuple[str, int], **fields: Any) -> None:
        """Four seconds of start-up, metrics of one phase from `first` to `last`, and the journal entry of it all."""
        started, self.clock = self.clock, self.clock + 4.0
        if fields.pop("lines", True):
            self.steps(number, first[0], first[1], last[1])
        self.clock += 2.0
        entry = {
            "attempt": number, "job": str(100 + number), "executor": "local", "host": "n1", "ranks": 2,
            "pids": {"0": 11, "1": 12}, "started": started, "first_step": {"phase": first[0], "step": first[1]},
            "commit": "abc123", "versions": {"python": "3.11.9", "megatron-core": "0.16.1"}, "backend": "cpu-rig",
            "startup": {"import": 2.0, "setup": 1.0, "data": 0.5, "first_step": 0.5}, "ended": self.clock,
            "outcome": "finished", "reason": "", "last_step": {"phase": last[0], "step": last[1]}, "signal": None,
            "signal_to_durable": None, "redone_steps": 0,
        }  # fmt: skip
        self.write(f"attempts/{number:04d}.json", entry | fields)
        self.clock += 10.0

    def evaluate(self, phase: str, step: int, losses: dict[str, float]) -> None:
        """The held-out losses at the end of a phase."""
        index = [found.name for found in self.run.phases].index(phase)
        tokens = derive.tokens_until(self.run, index, step)
        self.write(
            f"evals/{phase}.json", {"phase": phase, "step": step, "tokens": tokens, "losses": losses, "rows": {}}
        )

    def checkpoint(self, phase: str, step: int, why: str) -> None:
        """A complete checkpoint of 3 MB that took half a second."""
        index = [found.name for found in self.run.phases].index(phase)
        entry = {
            "phase": phase, "step": step, "tokens": derive.tokens_until(self.run, index, step), "why": why,
            "files": {"a": {"bytes": 2_000_000, "xxh3": "0"}, "b": {"bytes": 1_000_000, "xxh3": "0"}}, "seconds": 0.5,
            "created": self.clock,
        }  # fmt: skip
        self.write(f"checkpoints/{phase}/step_{step:08d}/manifest.json", entry)
        files.append_line(self.path / "saves.jsonl", {"phase": phase, "step": step, "stood_still": 0.5})

    def _plan(self) -> dict[str, Any]:
        phases = []
        for phase in self.run.phases:
            samples = derive.phase_samples(phase)
            counts = {name: round(weight * samples) for name, weight in phase.mixture.items()}
            sources = {
                name: {"samples": count, "tokens": count * 64, "epochs": count * 64 / STORE_TOKENS}
                for name, count in counts.items()
            }
            steps, tokens = derive.phase_steps(phase), derive.phase_tokens(phase)
            entry = {"name": phase.name, "steps": steps, "tokens": tokens, "samples": samples, "sources": sources}
            phases.append(entry)
        stores = {
            name: {"store": path, "tokens": STORE_TOKENS, "digest": "d1"}
            for name, path in self.run.data.sources.items()
        }
        digest = derive.run_digest(self.run)
        return {"run": self.run.name, "digest": digest, "sources": stores, "phases": phases}


MakeRun = Callable[..., RunFolder]
