"""Claim: `crystal --help` and `crystal plan` answer within 0.3 s, without torch; a job starts as its engine does.

First part, whole processes, taking turns: `crystal --help` and `crystal plan` on real small stores against the named
peers `python -c "import torch"` and `python -c pass`. Second part: a real `crystal submit --wait` of two ranks, from
the start of rank 0 to the end of its first step as the journal splits it (import, setup, data, first_step), against
the same Python importing torch and megatron.core and doing nothing else, in one process and in two at once.

    python benchmarks/startup.py [--runs 10] [--json FILE]

Processor time (user + system) stands beside the wall time: a neighbour on the machine disturbs it less. Exit code 0 if
the fastest run of both commands takes 0.3 s or less and neither imports torch, else 1.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from crystal_hpc.config.load import load_run
from crystal_hpc.data.build import build_store
from crystal_hpc.data.harvest import harvest
from crystal_hpc.data.tokenizer import train_tokenizer
from crystal_hpc.files import read_json

AIM = 0.3  # seconds
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG, CLUSTER = str(CONFIGS / "crystal-demo.yaml"), str(CONFIGS / "clusters" / "local.yaml")
# Runs a command of `crystal` in this process, and says afterwards whether torch came along.
PROBE = """
import sys
from crystal_hpc.cli import main
main(sys.argv[1:], standalone_mode=False)
print("torch" in sys.modules, file=sys.stderr)
"""
ENGINE = "import torch, megatron.core"

Words = list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="of each command (default: 10)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # measured as installed: compiled once, by the first run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_data(folder)
        commands = _commands(folder, arguments.runs)
        job = _job(folder)
    ok = all(
        commands[name]["best"] <= AIM and not commands[name]["torch"] for name in ("crystal --help", "crystal plan")
    )
    _show(commands, job)
    if arguments.json:
        arguments.json.write_text(json.dumps({"commands": commands, "job": job}, indent=2) + "\n")
    return 0 if ok else 1


def _commands(folder: Path, runs: int) -> dict[str, dict[str, Any]]:
    """Seconds of each command, best and median; a first run of each fills the caches and does not count."""
    crystal = [sys.executable, "-c", "from crystal_hpc.cli import run; run()"]
    asked = {"crystal --help": ["--help"], "crystal plan": ["plan", CONFIG]}
    words = {name: [*crystal, *asked[name]] for name in asked}
    words["python -c pass"] = [sys.executable, "-c", "pass"]
    words['python -c "import torch"'] = [sys.executable, "-c", "import torch"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in words}
    for turn in range(runs + 1):
        for name, command in words.items():
            seconds = _run(command, folder)
            times[name] += [seconds] if turn else []
    return {
        name: {
            "best": min(wall for wall, _ in found),
            "median": statistics.median(wall for wall, _ in found),
            "processor": statistics.median(busy for _, busy in found),
            "torch": _imports_torch(asked[name], folder) if name in asked else "torch" in name,
        }
        for name, found in times.items()
    }


def _run(words: Words, folder: Path) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _imports_torch(asked: Words, folder: Path) -> bool:
    words = [sys.executable, "-c", PROBE, *asked]
    said = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stderr
    return said.split()[-1] == "True"


def _job(folder: Path) -> dict[str, Any]:
    """The start of a real job as its journal has it, and what importing its engine alone takes, one after the other."""
    _import_engine(1)  # fills the caches
    one, two = _import_engine(1), _import_engine(2)
    short = [f"phases.{phase.name}.steps=8" for phase in load_run(CONFIG).phases]
    flat = [f"phases.{phase.name}.learning_rate.warmup_steps=2" for phase in load_run(CONFIG).phases]
    words = ["submit", CONFIG, *short, *flat, "--cluster", CLUSTER, "--wait"]
    started = time.time()
    subprocess.run([sys.executable, "-m", "crystal_hpc.cli", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (attempt,) = (folder / "runs").glob("*/attempts/0001.json")
    entry = read_json(attempt)
    laps: dict[str, float] = entry["startup"]
    first_line = (attempt.parents[1] / "metrics.jsonl").read_text().partition("\n")[0]
    return {
        "engine alone": one,
        "engine twice at once": two,
        "startup": laps,
        "first step": sum(laps.values()),
        "first step since submit": json.loads(first_line)["time"] - started,
    }


def _import_engine(processes: int) -> float:
    """Seconds until so many processes at once have all imported torch and megatron.core."""
    words, started = [sys.executable, "-W", "ignore", "-c", ENGINE], time.perf_counter()
    running = [subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(processes)]
    assert all(process.wait() == 0 for process in running)
    return time.perf_counter() - started


def _show(commands: dict[str, dict[str, Any]], job: dict[str, Any]) -> None:
    print(f"{'command':<28}{'best':>9}{'median':>9}{'processor':>11}  torch imported")
    for name, found in commands.items():
        times = f"{found['best']:>7.3f} s{found['median']:>7.3f} s{found['processor']:>9.3f} s"
        print(f"{name:<28}{times}  {'yes' if found['torch'] else 'no'}")
    torch = commands['python -c "import torch"']["median"]
    ratio = torch / commands["crystal plan"]["median"]
    print(f"crystal plan answers {ratio:.1f} times as fast as torch is imported; aim: {AIM} s or less, best run\n")
    print("start of a job of two ranks, seconds of rank 0")
    for lap, seconds in job["startup"].items():
        print(f"  {lap:<44}{seconds:>7.2f} s")
    print(f"  {'first step done, since the process began':<44}{job['first step']:>7.2f} s")
    print(f"  {'first step done, since `crystal submit`':<44}{job['first step since submit']:>7.2f} s")
    print(f"  {ENGINE + ', one process':<44}{job['engine alone']:>7.2f} s")
    print(f"  {ENGINE + ', two at once':<44}{job['engine twice at once']:>7.2f} s")
    print(f"first step / engine alone, two at once: {job['first step'] / job['engine twice at once']:.2f}")


def _make_data(folder: Path) -> None:
    """What configs/crystal-demo.yaml names, smaller."""
    corpus, tokenizer = folder / "demo" / "corpus", folder / "demo" / "tokenizer"
    harvest(corpus, 3_000_000, held_out=0.05)
    train_tokenizer([corpus / "prose.jsonl", corpus / "code.jsonl"], tokenizer, 4096)
    for path in sorted(corpus.glob("*.jsonl")):
        build_store([path], folder / "demo" / "stores" / path.stem, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
