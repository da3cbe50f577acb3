"""Claims: a 1,000-task array is queued as fast as plain submitit does it; a preemption loses no step; a requeued job
takes its first step about as soon as its engine is imported.

All three on a private Slurm of two nodes (slurm/devcluster), started and stopped here; needs root.

1. Arrays, taking turns: `Executor.submit_slices(task, N)` against `submitit.SlurmExecutor.map_array` of the same task,
   both held in the queue and cancelled afterwards.
2. Preemptions: the drill's toy run, disturbed again and again by a real job of a partition that comes first. Steps done
   again, against those that periodic checkpoints alone would have had to do again.
3. Requeued starts of the same run: from the start of rank 0's process to the end of its first step, against the same
   Python importing torch and megatron.core in two processes at once.

    python benchmarks/slurm.py [--tasks 1000] [--repeats 5] [--preemptions 8] [--json FILE]

Exit code 0 if arrays are queued no slower than by submitit and no step was lost, else 1.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import submitit

from crystal_hpc import files
from crystal_hpc.config.schema import Cluster
from crystal_hpc.drill import faults, recipe
from crystal_hpc.jobs import journal, slurm, submit, submitted
from crystal_hpc.jobs.executor import Executor
from crystal_hpc.jobs.task import TrainTask

ROOT = Path(__file__).resolve().parents[1]
DEVCLUSTER = [sys.executable, str(ROOT / "slurm" / "devcluster" / "devcluster.py")]
ENGINE = "import torch, megatron.core"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000, help="of the array (default: 1000)")
    parser.add_argument("--repeats", type=int, default=5, help="of each submission and import (default: 5)")
    parser.add_argument("--preemptions", type=int, default=8, help="of the toy run (default: 8)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [*DEVCLUSTER, "--folder", str(folder / "cluster")]
        subprocess.run(
            [*words, "up", "--nodes", "2", "--max-array-size", "5001"], check=True, stdout=subprocess.DEVNULL
        )
        os.environ["SLURM_CONF"] = str(folder / "cluster" / "slurm.conf")
        try:
            arrays = _arrays(folder, arguments.tasks, arguments.repeats)
            preempted = _preemptions(folder, arguments.preemptions)
        finally:
            subprocess.run([*words, "down"], check=True)
    engine = _two_imports(arguments.repeats)
    figures = {"arrays": arrays, "preemptions": preempted, "two processes importing the engine, s": engine}
    for line in _lines(figures):
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))
    return 0 if arrays["ours / submitit"] <= 1 and preempted["steps lost"] == 0 else 1


def _arrays(folder: Path, tasks: int, repeats: int) -> dict[str, Any]:
    """Seconds to queue an array, both ways taking turns."""
    parameters = {"time": 5, "array_parallelism": 1, "additional_parameters": {"hold": True}, "wckey": None}
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(repeats):
        for seconds, mine in ((ours, True), (theirs, False)):
            where = folder / f"{'ours' if mine else 'theirs'}-{number}"
            began = time.perf_counter()
            if mine:
                jobs = Executor(where, sys.executable, parameters).submit_slices(TrainTask(folder), tasks)
            else:
                executor = submitit.SlurmExecutor(where)
                executor.update_parameters(**parameters)
                jobs = executor.map_array(_task, [folder] * tasks)
            seconds.append(time.perf_counter() - began)
            assert len(jobs) == tasks
            slurm.cancel([jobs[0].job_id.partition("_")[0]])
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {"tasks": tasks, "ours, s": ours, "submitit, s": theirs, "ours / submitit": ratio}


def _task(folder: Path) -> str:
    return TrainTask(folder)()


def _preemptions(folder: Path, count: int) -> dict[str, Any]:
    """Preempts a run every so many steps; what each cost."""
    recipe.make_data(folder / "data")
    cluster = Cluster.model_validate(
        {
            "name": "dev", "executor": "slurm", "nodes": 1, "ranks_per_node": 2, "time_limit": "30min",
            "environment": {"OMP_NUM_THREADS": "1"}, "slurm": {"partition": "normal", "cpus_per_rank": 1},
        }
    )  # fmt: skip
    run = recipe.make_run(folder / "data", "preempted", cluster)
    long = run.phases[1].model_copy(update={"steps": 100 * (count + 1)})
    run = run.model_copy(update={"phases": [run.phases[0], long, run.phases[2]]})
    where = submit.prepare(run, cluster, folder / "runs")
    submit.start(where, cluster)
    chance = random.Random(1)
    for number in range(count):
        step = number * 60 + chance.randint(5, 55)
        while not _reached(where, "code", step):
            time.sleep(0.05)
        entry = journal.read_attempts(where)[-1]
        nodes = sorted(set(entry["nodes"]))
        faults.FAULTS["preempt"](faults.Target(entry["job"], nodes, entry, chance, "urgent", None))
        while len(journal.read_attempts(where)) < entry["attempt"] + 1:
            time.sleep(0.1)
    while submitted.queued(where):
        time.sleep(0.5)
    attempts = journal.read_attempts(where)
    hit = [entry for entry in attempts if entry["outcome"] == "preempted"]
    after = [attempts[entry["attempt"]] for entry in hit]
    return {
        "preemptions": len(hit),
        "steps lost": sum(entry["redone_steps"] for entry in after),
        "steps that periodic checkpoints alone would have lost": sum(
            entry["last_checkpoint"]["step"] % recipe.CHECKPOINT_EVERY for entry in hit
        ),
        "signal to durable, s": [entry["signal_to_durable"] for entry in hit],
        "requeued start to first step, s": [
            sum(entry["startup"].values()) for entry in after if "first_step" in entry["startup"]
        ],
    }


def _reached(folder: Path, phase: str, step: int) -> bool:
    line = files.last_line(folder / "metrics.jsonl")
    attempts = journal.read_attempts(folder)
    running = bool(attempts) and attempts[-1]["outcome"] is None and len(attempts[-1]["pids"]) == 2
    return running and line is not None and (line["phase"], line["step"] >= step) == (phase, True)


def _two_imports(repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        both = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", ENGINE]) for _ in range(2)]
        for process in both:
            process.wait()
        seconds.append(time.perf_counter() - began)
    return seconds


def _lines(figures: dict[str, Any]) -> list[str]:
    arrays, preempted = figures["arrays"], figures["preemptions"]
    ours, theirs = statistics.median(arrays["ours, s"]), statistics.median(arrays["submitit, s"])
    first = statistics.median(preempted["requeued start to first step, s"])
    engine = statistics.median(figures["two processes importing the engine, s"])
    alone = preempted["steps that periodic checkpoints alone would have lost"]
    return [
        f"an array of {arrays['tasks']} tasks: ours {ours:.2f} s, plain submitit {theirs:.2f} s; "
        f"ours / submitit {arrays['ours / submitit']:.2f} (aim 1 or less)",
        f"{preempted['preemptions']} preemptions: {preempted['steps lost']} steps done again (aim 0); periodic "
        f"checkpoints alone would have lost {alone}; signal to durable {max(preempted['signal to durable, s']):.2f} s "
        "at most",
        f"requeued start to first step {first:.2f} s, two processes importing torch and megatron.core {engine:.2f} s: "
        f"{first / engine:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
