"""What two ranks trained and saved for the tests of this folder, under several layouts (`megatron_worker`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run

REPOSITORY = Path(__file__).parents[2]

# An odd vocabulary is padded for two tensor-parallel ranks; four rotary dimensions tell the two pairings apart.
RUN = """
name: tiny
precision: fp32
model: {layers: 2, hidden: 32, heads: 4, ffn: 42, vocab_size: 126, rotary_fraction: 0.5, init_std: 0.073}
mup: {base_hidden: 16, embedding_multiplier: 14.6, output_multiplier: 2.22}
data: {tokenizer: tokenizer, sources: {prose: prose}}
parallel: {micro_batch: 2, distributed_optimizer: false}
phases:
- {name: words, sequence_length: 48, batch_size: 8, steps: 10, mixture: {prose: 1.0}, learning_rate: {peak: 0.01}}
"""


@dataclass(frozen=True)
class Trained:
    """`folder / <layout>` is a run folder with one checkpoint; `results` is what the verifying process saw."""

    folder: Path
    results: dict[str, Any]

    def run(self, *overrides: str) -> Run:
        return load_run(self.folder / "run.yaml", overrides)

    def checkpoint(self, layout: str) -> Path:
        return self.folder / layout / "checkpoints/words/step_00000003"
