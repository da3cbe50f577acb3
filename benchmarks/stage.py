"""Claim: a staged store, every byte checked against its digests, comes at 0.9 times the speed of `cp` or better.

One process copies a store of random tokens from a folder to another on the same file system, as `crystal data stage`
does, and `cp` of coreutils copies the same files; they take turns, and both are done when everything is on the disk
(`cp` and then fsync of each file, which staging does by itself). Measured with the source in the page cache, where
processor time decides, and, where caches may be dropped (root), from the disk.

    python benchmarks/stage.py [--gigabytes 1] [--turns 5] [--folder FOLDER] [--json FILE]

Exit code 0 if the median ratio is 0.9 or more in both.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crystal_hpc.comm import SoloComm
from crystal_hpc.data.catalog import STORE_FILE, StoreInfo, digest_of
from crystal_hpc.data.shard import Documents, write_shard
from crystal_hpc.data.staging import stage_stores
from crystal_hpc.files import fsync_path, write_json

AIM = 0.9
SHARDS = 4
DOCUMENT = 1000  # tokens
DROP = Path("/proc/sys/vm/drop_caches")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the store (default: 1)")
    parser.add_argument("--turns", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to work (default: that of temporary files)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        info = _make_store(folder / "shared", int(arguments.gigabytes * 1e9))
        figures = {"from the page cache": _measure(info, folder, arguments.turns, cold=False)}
        if os.access(DROP, os.W_OK):
            figures["from the disk"] = _measure(info, folder, arguments.turns, cold=True)
        else:
            print("from the disk: not measured; dropping caches needs root")
    _show(info, figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(found["ratio"] >= AIM for found in figures.values()) else 1


def _measure(info: StoreInfo, folder: Path, turns: int, cold: bool) -> dict[str, Any]:
    """Bytes a second of each, turn by turn; the first turn fills the caches and does not count."""
    size = sum(shard.bytes for shard in info.shards)
    ways: dict[str, Callable[[Path], None]] = {"stage": lambda to: _stage(info, to), "cp": lambda to: _cp(info, to)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        # The other one first each time: what a turn leaves behind must not always fall on the same.
        for name in sorted(ways, reverse=turn % 2 == 0):
            to = folder / "copy"
            to.mkdir()
            _prepare(info, cold)
            started = time.perf_counter()
            ways[name](to)
            seconds = time.perf_counter() - started
            rates[name] += [size / seconds] if turn else []
            shutil.rmtree(to)
    ratios = [ours / theirs for ours, theirs in zip(rates["stage"], rates["cp"], strict=True)]
    return {**rates, "ratios": ratios, "ratio": statistics.median(ratios)}


def _stage(info: StoreInfo, to: Path) -> None:
    staged = stage_stores([info], to, SoloComm())
    assert staged.copied == sum(shard.bytes for shard in info.shards)


def _cp(info: StoreInfo, to: Path) -> None:
    subprocess.run(["cp", *(info.folder / shard.name for shard in info.shards), to], check=True)
    for shard in info.shards:
        fsync_path(to / shard.name)
    fsync_path(to)


def _prepare(info: StoreInfo, cold: bool) -> None:
    """Nothing left to write; the source in the page cache, or nowhere."""
    os.sync()
    if cold:
        DROP.write_text("3")
        return
    for shard in info.shards:
        with open(info.folder / shard.name, "rb") as file:
            while file.read(1 << 24):
                pass


def _make_store(folder: Path, size: int) -> StoreInfo:
    """A store of documents of random tokens, about `size` bytes in all."""
    folder.mkdir()
    chance = np.random.default_rng(1)
    shards = []
    for number in range(SHARDS):
        tokens = chance.integers(0, 32000, size // SHARDS // 2, dtype=np.uint16)
        ends = np.append(np.arange(0, len(tokens), DOCUMENT), len(tokens))
        hashes = chance.integers(0, 2**63, (len(ends) - 1, 2)).astype(np.uint64)
        nothing = np.zeros(len(ends), np.int64), np.zeros(0, np.uint8)
        documents = Documents(ends.astype(np.int64), hashes, hashes, *nothing)
        shards.append(write_shard(folder / f"shard-{number:05d}.h5", documents, tokens, {"tokenizer": "none"}))
    info = StoreInfo(
        folder=folder,
        name="random",
        tokenizer="none",
        vocab_size=32000,
        max_token=max(shard.max_token for shard in shards),
        dtype="uint16",
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        seed=1,
        bos=None,
        eos=None,
        rejected={},
        shards=tuple(shards),
        digest=digest_of(shard.digest for shard in shards),
    )
    write_json(folder / STORE_FILE, info.as_json())
    return info


def _show(info: StoreInfo, figures: dict[str, dict[str, Any]]) -> None:
    print(f"{sum(shard.bytes for shard in info.shards) / 1e9:.2f} GB in {len(info.shards)} shards, copied and fsynced")
    print(f"{'source':<22}{'staged, checked':>18}{'cp':>14}   ratio (median of turns; each turn)")
    for name, found in figures.items():
        ours, theirs = (statistics.median(found[way]) / 1e9 for way in ("stage", "cp"))
        turns = " ".join(f"{ratio:.2f}" for ratio in found["ratios"])
        print(f"{name:<22}{ours:>13.2f} GB/s{theirs:>9.2f} GB/s   {found['ratio']:.2f} ({turns}); aim {AIM}")


if __name__ == "__main__":
    sys.exit(main())
