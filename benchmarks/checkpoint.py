"""Claims: a save is 0.8 times as fast as writing its bytes, or more; an asynchronous one stops training for 5 % of it.

The state is that of a model of about 100 million weights in bf16 with the distributed optimizer, 1.4 GB, on the CPU
rig. `one rank` trains in our loop with periodic asynchronous saves, and then in a bare loop with Megatron's own; after
that, with nothing else going on, the ways to save the state take turns, and so do the ways to load it. `two ranks` save
and load only.

Saving, until the bytes are durable: ours (`Saver.save`: serialization, digests, norms, fsync, manifest, rename);
`raw`, os.write of as many bytes of memory in blocks of 1 MiB (`dd bs=1M`) by as many processes, then fsync; and
`megatron.core.dist_checkpointing.save` as Megatron's examples call it, then fsync of its files and folder (most of
which its writer has done). Megatron's default writer uses two processes a rank in 0.16, one in 0.19.

Standing still, for an asynchronous save: ours is the time in `Saver.begin`, in the wait before the update, and in the
commit; Megatron's that in `dist_checkpointing.save(async_sharded_save=True)`, in scheduling, and in finalizing. Without
a GPU, Megatron's scheduling is a fork of the process, whose memory is then copied page by page as training writes it:
that makes its steps longer and is no stall, so what the steps cost more while a save is written stands beside it.

Loading into the trainer: ours (`restore.load_latest`: all digests verified, then loaded); `raw`, the same files read
into a buffer; and `megatron.core.dist_checkpointing.load` of Megatron's checkpoint and `load_state_dict`, which verify
nothing. With the files in the page cache, and after they were dropped from it (what lies below, such as the cache of a
virtual machine's host, is out of reach).

    python benchmarks/checkpoint.py [--full] [--turns 5] [--folder FOLDER] [--json FILE]

Ratios are medians over the turns. Exit code 0 if all aims are met, else 1.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the ranks

import numpy as np
from torch.multiprocessing.spawn import spawn

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.data.batches import PhaseBatches
from crystal_hpc.data.order import run_orders
from crystal_hpc.files import fsync_path, read_lines, write_json
from crystal_hpc.log import setup_logging
from crystal_hpc.model import backend, parallel
from crystal_hpc.train import loop, restore, sharding
from crystal_hpc.train.checkpoint import Saver
from crystal_hpc.train.metrics import Metrics
from crystal_hpc.train.preemption import StopFlag
from crystal_hpc.train.state import Position
from crystal_hpc.train.step import Trainer, build_trainer, train_step

with backend.quiet():
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

AIMS = {("save", "raw"): 0.8, ("save", "megatron"): 1.0}  # ours is that many times as fast
STALL = 0.05  # of a save that training waits for
BLOCK = 1 << 20
TOKENS = 1_000_000
STEPS_A_SAVE = 4
SAVES = 4  # asynchronous ones; the first makes the copy buffer, and is told apart
PLACES = "in the page cache", "from the disk"
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "crystal-demo.yaml"

Way = Callable[[Path], None]
Figures = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="a model of 300 million weights, a state of 4.2 GB")
    parser.add_argument("--turns", type=int, default=5, help="of each way to save and load (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to work (default: that of temporary files)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = {}
    for size, case in ((1, "one rank"), (2, "two ranks")):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            given = size, folder, arguments.turns, 24 if arguments.full else 12
            spawn(_rank, given, nprocs=size)  # type: ignore[no-untyped-call]
            figures[case] = json.loads((folder / "figures.json").read_text())
        _show(case, figures[case])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(met for found in figures.values() for _, met in _results(found)) else 1


def _rank(rank: int, size: int, folder: Path, turns: int, layers: int) -> None:
    """All that one case measures; rank 0 writes it down."""
    sys.stderr = open(folder / f"rank{rank}.log", "w", buffering=1)  # noqa: SIM115 (where a job's log lines go)
    run = _run(layers)
    bench = Bench(run, parallel.start(run, rank, size, rank, folder / "meeting"), folder)
    setup_logging(rank)
    figures: Figures = {}
    if size == 1:
        figures["standing still"] = {"ours": bench.our_loop(), "megatron": bench.megatron_loop()}
    else:
        bench.step(0)  # so that the moments are memory of their own
    figures |= {"bytes": bench.total, "save": bench.saves(turns)}
    figures["bytes on disk"] = {name: _size(folder / name) for name in ("ours", "megatron")}
    figures |= {f"load, {where}": bench.loads(turns, where == "from the disk") for where in PLACES}
    if rank == 0:
        write_json(folder / "figures.json", figures)
    parallel.stop()


class Bench:
    """One rank's part of a case."""

    def __init__(self, run: Run, layout: parallel.Layout, folder: Path) -> None:
        self.run, self.layout, self.comm, self.folder = run, layout, layout.comm, folder
        self.trainer = build_trainer(run, layout)
        self.sources: Any = {"random": Random(run.model.vocab_size)}
        self.orders = run_orders(run, {"random": TOKENS})
        phase, share = run.phases[0], (layout.data_rank, layout.data_size)
        self.batches = PhaseBatches(self.orders[0], self.sources, phase.batch_size, run.parallel.micro_batch, *share)
        held = sharding.model_parts(sharding.module(self.trainer))
        # Every weight has 2 bytes in the model, and 4 in the optimizer's copy and in each moment.
        self.mine = sum(part.tensor.nbytes for part in held if part.ours) * 14 // 2
        self.total = self.comm.sum([self.mine])[0]
        self.memory = bytearray(os.urandom(1 << 20) * (self.mine // (1 << 20) + 1))[: self.mine]

    def step(self, number: int) -> float:
        """Trains for a step; returns the seconds it took."""
        started = time.perf_counter()
        train_step(self.trainer, self.batches.step(number), 1e-4, [])
        return time.perf_counter() - started

    def our_loop(self) -> Figures:
        """Trains as a job does, with a clock around what training waits for."""
        loop.Saver = TimedSaver  # type: ignore[attr-defined]
        folder = self.folder / "run"
        metrics = Metrics(folder, self.comm.rank, 1)
        loop.train(loop.Job(self.run, folder, self.trainer, StopFlag(), self.sources, {}, metrics))
        metrics.close()
        shutil.rmtree(folder / "checkpoints")
        steps = [line["seconds"] for line in read_lines(folder / "metrics.jsonl")]
        return _standing_still(TimedSaver.saves, list(zip(steps, TimedSaver.steps, strict=True)))

    def megatron_loop(self) -> Figures:
        """The same steps, with Megatron's asynchronous saves in between."""
        queue = AsyncCallsQueue()
        saves: list[dict[str, float]] = []
        steps: list[tuple[float, bool]] = []
        folder = self.folder / "asynchronous"
        for number in range(self.run.phases[0].steps or 0):
            busy = queue.get_num_unfinalized_calls() > 0
            steps.append((self.step(number), busy))
            if busy:
                with clock(saves, "commit"):
                    queue.maybe_finalize_async_calls()
            if (number + 1) % STEPS_A_SAVE == 0 and len(saves) < SAVES:
                queue.maybe_finalize_async_calls(blocking=True)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                saves.append({})
                with clock(saves, "begin"):
                    request = dist_checkpointing.save(
                        _megatron_state(self.trainer), str(folder), async_sharded_save=True
                    )
                    queue.schedule_async_request(request)
        queue.close()
        shutil.rmtree(folder)
        return _standing_still(saves, steps)

    def saves(self, turns: int) -> Figures:
        """Seconds of each way to save, turn by turn; what the last turn has written stays."""
        ways: dict[str, Way] = {"ours": self._save, "raw": self._write_raw, "megatron": self._save_as_megatron}

        def prepare(folder: Path) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            os.sync()

        return self._take_turns(ways, turns, prepare)

    def loads(self, turns: int, cold: bool) -> Figures:
        """Seconds of each way to load what `saves` has left, turn by turn."""
        ways: dict[str, Way] = {"ours": self._load, "raw": self._read_raw, "megatron": self._load_as_megatron}
        return self._take_turns(ways, turns, lambda folder: _put_in_cache(folder, not cold))

    def _take_turns(self, ways: dict[str, Way], turns: int, prepare: Way) -> Figures:
        """The first turn, in which memory is allocated and helpers start, does not count."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns + 1):
            for name in sorted(ways, reverse=turn % 2 == 0):
                if self.comm.rank == 0:
                    prepare(self.folder / name)
                self.comm.barrier()
                started = time.perf_counter()
                ways[name](self.folder / name)
                self.comm.barrier()
                seconds[name] += [time.perf_counter() - started] if turn else []
        return seconds

    def _save(self, folder: Path) -> None:
        Saver(self.trainer, folder, self.orders).save(Position(0, 1), "preempted")

    def _write_raw(self, folder: Path) -> None:
        left = memoryview(self.memory)
        descriptor = os.open(folder / str(self.comm.rank), os.O_WRONLY | os.O_CREAT)
        while left:
            left = left[os.write(descriptor, left[:BLOCK]) :]
        os.fsync(descriptor)
        os.close(descriptor)

    def _save_as_megatron(self, folder: Path) -> None:
        dist_checkpointing.save(_megatron_state(self.trainer), str(folder))
        if self.comm.rank == 0:
            for path in (*folder.iterdir(), folder):
                fsync_path(path)

    def _load(self, folder: Path) -> None:
        position, _ = restore.load_latest(self.trainer, folder)
        assert position == Position(0, 1)

    def _read_raw(self, folder: Path) -> None:
        block = bytearray(BLOCK)
        with open(folder / str(self.comm.rank), "rb", buffering=0) as file:
            while file.readinto(block):
                pass

    def _load_as_megatron(self, folder: Path) -> None:
        loaded = dist_checkpointing.load(_megatron_state(self.trainer, loading=True), str(folder))
        sharding.module(self.trainer).load_state_dict(loaded["model"])
        self.trainer.optimizer.load_state_dict(loaded["optimizer"])


class TimedSaver(Saver):
    """Notes how long training waits for each save, and which steps pass while one is written."""

    saves: ClassVar[list[dict[str, float]]] = []
    steps: ClassVar[list[bool]] = []

    def begin(self, position: Position, why: Any = "periodic") -> Position | None:
        self.saves.append({})
        with clock(self.saves, "begin"):
            return super().begin(position, why)

    def before_update(self) -> None:
        if self.under_way:
            with clock(self.saves, "copy"):
                super().before_update()

    def advance(self) -> Position | None:
        if not self.under_way:
            return None
        with clock(self.saves, "commit"):
            return super().advance()

    def vote(self) -> int:
        """Asked at the start of each step."""
        self.steps.append(self.under_way is not None)
        return super().vote()

    def save(self, _position: Position, _why: Any) -> None:
        """At the end of the phase: what a save takes that training waits for is measured by itself."""


class Random:
    """A source of random rows, in memory."""

    def __init__(self, vocab_size: int) -> None:
        self.info = SimpleNamespace(tokens=TOKENS)
        self._tokens = np.random.default_rng(1).integers(0, vocab_size, TOKENS)

    def rows(self, sequence_length: int) -> int:
        return (TOKENS - 1) // sequence_length

    def read_row(self, number: int, sequence_length: int) -> Any:
        row = self._tokens[number * sequence_length :][: sequence_length + 1]
        return row[:-1], row[1:], None


@contextlib.contextmanager
def clock(saves: list[dict[str, float]], what: str) -> Iterator[None]:
    """Adds the seconds that the block takes to the newest save's."""
    started = time.perf_counter()
    try:
        yield
    finally:
        saves[-1][what] = saves[-1].get(what, 0.0) + time.perf_counter() - started


def _standing_still(saves: list[dict[str, float]], steps: list[tuple[float, bool]]) -> Figures:
    alone = statistics.median(seconds for seconds, busy in steps if not busy)
    waited = sum(save.get("copy", 0.0) for save in saves)  # is part of a step's seconds
    slower = sum(seconds - alone for seconds, busy in steps if busy) - waited
    return {
        "saves": saves,
        "first": sum(saves[0].values()),
        "stall": statistics.median(sum(save.values()) for save in saves[1:]),
        "step": alone,
        "slower": slower / len(saves),
        "steps": steps,
    }


def _megatron_state(trainer: Trainer, loading: bool = False) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
    }
    model = sharding.module(trainer).sharded_state_dict(metadata=metadata)  # type: ignore[operator]
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _put_in_cache(folder: Path, wanted: bool) -> None:
    """Has the kernel hold a folder's files in memory, or nothing of them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while wanted and file.read(BLOCK):
                    pass
                if not wanted:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _run(layers: int) -> Run:
    """The demo's run with a larger model and one source."""
    run = load_run(CONFIG)
    shape = {"layers": layers, "hidden": 768, "heads": 12, "ffn": 2048, "vocab_size": 16384}
    phase = {
        **{"sequence_length": 128, "batch_size": 2, "mixture": {"random": 1.0}, "fim": {}},
        **{"steps": STEPS_A_SAVE * (SAVES + 1), "checkpoint_every": STEPS_A_SAVE},
    }
    return run.model_copy(
        update={
            "precision": "bf16",
            "model": run.model.model_copy(update=shape),
            "data": run.data.model_copy(update={"sources": {"random": "random"}, "held_out": {}}),
            "parallel": run.parallel.model_copy(update={"micro_batch": 1}),
            "checkpoints": run.checkpoints.model_copy(update={"keep_last": 1}),
            "phases": [run.phases[0].model_copy(update=phase)],
        }
    )


def _results(figures: Figures) -> Iterator[tuple[str, bool]]:
    """A line for each claim, and whether its aim, if it has one, is met."""
    size = figures["bytes"]
    for what in ("save", *(f"load, {place}" for place in PLACES)):
        seconds = figures[what]
        for name, turns in seconds.items():
            median = statistics.median(turns)
            yield f"{what:<24}{name:<10}{median:>7.2f} s {size / median / 1e9:>6.2f} GB/s", True
        for peer in ("raw", "megatron"):
            ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[peer], strict=True)]
            ratio, aim = statistics.median(ratios), AIMS.get((what, peer))
            each = " ".join(f"{one:.2f}" for one in ratios)
            said = f"; aim {aim}" if aim else ""
            yield f"{'':<24}ours / {peer} {ratio:.2f} ({each}){said}", aim is None or ratio >= aim
    synchronous = {name: statistics.median(turns) for name, turns in figures["save"].items()}
    for name, found in figures.get("standing still", {}).items():
        share = found["stall"] / synchronous["ours"]
        said = f"; aim {STALL:.0%}" if name == "ours" else ""
        yield (
            f"{'asynchronous save':<24}{name:<10}training stands still for {found['stall']:.3f} s, {share:.1%} of our "
            f"synchronous save{said} (the first of {SAVES}: {found['first']:.3f} s); the steps beside it, of "
            f"{found['step']:.2f} s otherwise, take {found['slower']:.2f} s more in all",
            name != "ours" or share <= STALL,
        )


def _show(case: str, figures: Figures) -> None:
    disk = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in figures["bytes on disk"].items())
    print(f"{case}: a state of {figures['bytes'] / 1e9:.2f} GB (on disk: {disk})")
    for line, _ in _results(figures):
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
