"""The toy run that the drill disturbs: made-up text, three phases, steps of some milliseconds.

Small, but the whole thing: stores, phases with their own mixtures, a fresh optimizer in the last one, periodic
checkpoints, held-out losses, the distributed optimizer.
"""

import json
import random
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.data.build import build_store
from crystal_hpc.data.tokenizer import train_tokenizer

STORES = ("prose", "code", "held-out")
STEPS = {"prose": 80, "code": 160, "adaptation": 60}
LONG = 1600
"""Steps of the second phase where it must outlast Slurm's look at time limits, twice a minute."""
CHECKPOINT_EVERY = 25


def make_data(folder: Path) -> None:
    """A tokenizer and three stores; what is there from before is used again."""
    files.make_folder(folder)
    for number, name in enumerate(STORES):
        text = folder / f"{name}.jsonl"
        if not text.exists():
            chance = random.Random(number)
            files.write_file(text, "\n".join(json.dumps({"text": _text(chance)}) for _ in range(150)))
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer([folder / "prose.jsonl"], folder / "tokenizer", 512)
    for name in STORES:
        if not (folder / name / "store.json").exists():
            build_store([folder / f"{name}.jsonl"], folder / name, folder / "tokenizer", fresh=True)


def make_run(folder: Path, name: str, cluster: Cluster, long: bool = False) -> Run:
    """The run on data in a folder, its batch a multiple of what the cluster's ranks share."""
    batch = 2 * cluster.ranks

    def phase(number: int, mixture: dict[str, float], **more: Any) -> dict[str, Any]:
        name, steps = list(STEPS.items())[number]
        every = CHECKPOINT_EVERY
        if long and number == 1:
            steps, every = LONG, LONG // 10
        rate = {"peak": 0.01, "warmup_steps": 2, "end": 0.001}
        shape = {"sequence_length": 16, "batch_size": batch, "steps": steps, "checkpoint_every": every}
        return {"name": name, **shape, "mixture": mixture, "learning_rate": rate, **more}

    return Run.model_validate(
        {
            "name": name,
            "precision": "fp32",
            "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 536, "init_std": 0.073},
            "mup": {"base_hidden": 16, "embedding_multiplier": 14.6, "output_multiplier": 2.22},
            "parallel": {"micro_batch": 2, "distributed_optimizer": True},
            "data": {
                "tokenizer": str(folder / "tokenizer"),
                "sources": {"prose": str(folder / "prose"), "code": str(folder / "code")},
                "held_out": {"held-out": str(folder / "held-out")},
            },
            "evaluation": {"rows": batch},
            "phases": [
                phase(0, {"prose": 1.0}),
                phase(1, {"code": 0.6, "prose": 0.4}),
                phase(2, {"code": 1.0}, optimizer_state="fresh"),
            ],
        }
    )


def _text(chance: random.Random) -> str:
    syllables = [consonant + vowel for consonant in "bdklmn" for vowel in "aeiou"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(20)]
    return " ".join(chance.choices(words, k=60))
