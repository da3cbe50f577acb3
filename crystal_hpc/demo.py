"""`crystal demo`: the main job told as a story, on this machine, in a few minutes.

Nothing here but public commands, each printed before it runs so that the reader can repeat it, and one real signal in
the middle of the second phase. What exists from an earlier demo is used again; an unfinished one goes on.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.config.units import format_seconds
from crystal_hpc.errors import RunError
from crystal_hpc.jobs import journal

CONFIG = Path("configs/crystal-demo.yaml")
CLUSTER = Path("configs/clusters/local.yaml")
STORES = ("prose", "code", "prose-held-out", "code-held-out")
PROMPTS = ("The file", "def read(")


def run_demo(fresh: bool) -> None:
    """Tells the whole story; raises RunError where a command of it fails."""
    for path in (CONFIG, CLUSTER):
        if not path.exists():
            raise RunError(f"{path} is not here; run the demo in a checkout of crystal_hpc")
    began = time.monotonic()
    run = Path("runs", load_run(CONFIG).name)
    if fresh:
        files.remove_folder(Path("demo"))
        files.remove_folder(run)
    _make_data()
    _chapter("The plan, before anything runs")
    _crystal("plan", CONFIG)
    _train(run)
    _chapter("Was any sample lost or read twice? Every step against the plan")
    _crystal("ledger", run, "--check")
    _export(run)
    _chapter("The report")
    _crystal("report", run)
    _summary(run, time.monotonic() - began)


def _make_data() -> None:
    corpus, tokenizer, stores = Path("demo/corpus"), Path("demo/tokenizer"), Path("demo/stores")
    _chapter("A corpus from this Python installation: prose and code, some of each held out")
    if not _there(corpus / "code-held-out.jsonl"):
        _crystal("data", "corpus", "--out", corpus)
    _chapter("A tokenizer: LLaMA-style BPE with Crystal's special tokens")
    if not _there(tokenizer / "tokenizer.json"):
        inputs = (corpus / "prose.jsonl", corpus / "code.jsonl")
        _crystal("data", "tokenizer", *inputs, "--vocab", 4096, "--out", tokenizer)
    _chapter("Token stores: one HDF5 folder a source, documents shuffled")
    for name in STORES:
        _crystal("data", "build", corpus / f"{name}.jsonl", "--tokenizer", tokenizer, "--out", stores / name)
    _chapter("Did every document get there, once and whole? Every byte, count and text of the stores")
    held_out = [word for name in STORES[2:] for word in ("--held-out", stores / name)]
    _crystal("data", "audit", *(stores / name for name in STORES[:2]), *held_out, "--tokenizer", tokenizer)


def _train(run: Path) -> None:
    _chapter("Training on two ranks, three phases; in the middle of the second, a signal")
    words = ("submit", CONFIG, "--cluster", CLUSTER, "--wait")
    job = subprocess.Popen(_spelled(words))
    interrupted = any(entry["outcome"] == "time_limit" for entry in journal.read_attempts(run))
    while job.poll() is None and not interrupted:
        time.sleep(0.2)
        interrupted = _interrupt_half_way(run)
    if job.wait() != 0:
        raise RunError(f"the training job failed; see: crystal logs {run}")
    before, after = _around_the_interruption(run)
    click.echo(f"last step before the signal: {before}; first step after it: {after}")


def _interrupt_half_way(run: Path) -> bool:
    """Sends the signal by which Slurm says that time is nearly up, to every rank, half way through the second phase."""
    step = files.last_line(run / "metrics.jsonl")
    phase = load_run(CONFIG).phases[1]
    if step is None or step["phase"] != phase.name or step["step"] < (phase.steps or 0) // 2:
        return False
    pids = [int(pid) for pid in journal.read_attempts(run)[-1]["pids"].values()]
    click.secho(f"$ kill -USR2 {' '.join(map(str, pids))}", bold=True)
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    return True


def _around_the_interruption(run: Path) -> tuple[str, str]:
    """Last step before and first step after the attempt that was interrupted, in words."""
    attempts = journal.read_attempts(run)
    index = next(i for i, entry in enumerate(attempts) if entry["outcome"] == "time_limit")
    before, after = attempts[index]["last_step"], attempts[index + 1]["first_step"]
    if (after["phase"], after["step"]) != (before["phase"], before["step"] + 1):
        raise RunError(f"{run}: resumed at {after} after {before}: that is not the next step")
    return f"{before['phase']} {before['step']}", f"{after['phase']} {after['step']}"


def _export(run: Path) -> None:
    _chapter("Export to Hugging Face, and the logits of Transformers against Megatron's")
    folder = run / "exports" / "final"
    if not _there(folder / "config.json"):
        _crystal("export", run, "--out", folder)
    _chapter("A few generated lines (a model of this size and age babbles)")
    for prompt in PROMPTS:
        _crystal("sample", folder, "--prompt", prompt, "--tokens", 32)


def _summary(run: Path, seconds: float) -> None:
    _chapter("Summary")
    click.echo(f"{'held-out loss, nats':<22}" + "".join(f"{name:>10}" for name in ("prose", "code")))
    for phase in load_run(CONFIG).phases:
        losses = files.read_json(run / "evals" / f"{phase.name}.json")["losses"]
        click.echo(f"  after {phase.name:<14}{losses['prose']:>10.3f}{losses['code']:>10.3f}")
    for entry in journal.read_attempts(run):
        click.echo(f"attempt {entry['attempt']}: {entry['outcome']}, {entry['reason']}")
    click.echo(f"demo finished in {format_seconds(seconds)}")
    click.echo(f"report: {(run / 'report.html').resolve()}")


def _chapter(title: str) -> None:
    click.secho(f"\n== {title}", bold=True)


def _there(path: Path) -> bool:
    if path.exists():
        click.echo(f"{path.parent} is there from before")
    return path.exists()


def _crystal(*words: object) -> None:
    done = subprocess.run(_spelled(words), check=False)
    if done.returncode != 0:
        raise RunError(f"`crystal {words[0]}` ended with exit code {done.returncode}; its message stands above")


def _spelled(words: tuple[object, ...]) -> list[str]:
    """The command as this interpreter runs it; printed as a user would type it."""
    click.secho(f"$ crystal {shlex.join(map(str, words))}", bold=True)
    return [sys.executable, "-m", "crystal_hpc.cli", *map(str, words)]
