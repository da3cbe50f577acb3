"""Claim: a 7B model is converted at 0.7 times the speed of `cp` or better, both ways, in 2.5 GB of address space.

Random bfloat16 weights in the shape of Crystal-7B (32 layers of width 4096: 13 GB; by default only the first layers)
lie in a Hugging Face folder. A child process under RLIMIT_AS converts it to a Megatron checkpoint, another converts
that to a Hugging Face folder, with all digests on the way but nothing read back (`--verify none` does not even compare
the source's digests; here they are compared). `cp` of coreutils copies the same bytes; they take turns, and both are
done when everything is on the disk (`cp` and then fsync of each file, which conversions do by themselves). What comes
back is compared with the source, bit for bit.

    python benchmarks/convert.py [--layers 4 | --full] [--turns 3] [--folder FOLDER] [--json FILE]

Exit code 0 if the median ratio is 0.7 or more both ways.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

AIM = 0.7
LIMIT = 2_500_000_000  # bytes of address space
SHARD = 5 * 10**9
SPARE = 3  # times the weights: source, checkpoint, and what a turn writes

CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[4]),) * 2)
from pathlib import Path
from crystal_hpc.convert import from_hf, weights
from crystal_hpc.convert.reader import run_of
way, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
started = time.perf_counter()
if way == "to Megatron":
    with from_hf.opened(source) as opened:
        from_hf.convert(opened, out)
else:
    weights.export(source, run_of(source), None, out, "bfloat16")
seconds = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_SELF)
about = {"seconds": seconds, "processor": usage.ru_utime + usage.ru_stime}
for key, line in (("peak", "VmHWM"), ("space", "VmPeak")):
    about[key] = int(next(l for l in open("/proc/self/status") if l.startswith(line)).split()[1]) * 1024
print(json.dumps(about))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, default=4, help="of the 32 (default: 4, 1.9 GB)")
    size.add_argument("--full", dest="layers", action="store_const", const=32, help="all of them, 13 GB")
    parser.add_argument("--turns", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to work (default: that of temporary files)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        layers = _that_fit(arguments.layers, folder)
        nbytes = _make_folder(folder / "hf", layers)
        figures: dict[str, Any] = {"layers": layers, "bytes": nbytes, "limit": LIMIT}
        _convert("to Megatron", folder / "hf", folder / "weights")
        figures["to Megatron"] = _measure("to Megatron", folder / "hf", folder, arguments.turns)
        figures["to Hugging Face"] = _measure("to Hugging Face", folder / "weights", folder, arguments.turns)
        _convert("to Hugging Face", folder / "weights", folder / "back")
        figures["bit-equal"] = _same_weights(folder / "hf", folder / "back")
    _show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    ways = (figures["to Megatron"], figures["to Hugging Face"])
    return 0 if figures["bit-equal"] and all(found["ratio"] >= AIM for found in ways) else 1


def _that_fit(layers: int, folder: Path) -> int:
    free = shutil.disk_usage(folder).free
    fitting = next((fewer for fewer in range(layers, 0, -1) if SPARE * _weight_bytes(fewer) < free), 0)
    if not fitting:
        sys.exit(
            f"error: {folder} has {free / 1e9:.1f} GB free, and one layer takes {SPARE * _weight_bytes(1) / 1e9:.1f}"
        )
    if fitting < layers:
        print(f"only {fitting} of {layers} layers: the disk has {free / 1e9:.1f} GB free")
    return fitting


def _weight_bytes(layers: int) -> int:
    from crystal_hpc.config.derive import parameters

    return 2 * parameters(_model(layers))


def _model(layers: int) -> Any:
    from crystal_hpc.config.schema import Model

    return Model(layers=layers, hidden=4096, heads=32, ffn=10922, vocab_size=32032)


def _make_folder(folder: Path, layers: int) -> int:
    """Random weights, tensor by tensor; returns their bytes."""
    import torch

    from crystal_hpc.config.schema import Mup
    from crystal_hpc.convert import weights
    from crystal_hpc.convert.hf_folder import dump_index
    from crystal_hpc.convert.names import Shape, published_sizes
    from crystal_hpc.convert.safetensors_io import SafetensorsWriter
    from crystal_hpc.convert.shapes import as_run

    folder.mkdir()
    shape = Shape(_model(layers), Mup(base_hidden=256, embedding_multiplier=14.6, output_multiplier=2.22))
    entries = weights.FORMAT.entries(shape)
    config = weights.FORMAT.published_config(as_run(shape, 2048, "bf16"))
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {n: s for entry in entries for n, s in zip(entry.published, published_sizes(entry, shape), strict=True)}
    noise = (0.02 * torch.randn(1 << 27, generator=torch.Generator().manual_seed(1))).bfloat16()
    shards = weights.cut(entries, lambda entry: sum(2 * torch.Size(sizes[n]).numel() for n in entry.published), SHARD)
    placed: dict[str, str] = {}
    started = 0
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        layout = {part: (torch.bfloat16, sizes[part]) for entry in shard for part in entry.published}
        with SafetensorsWriter(folder / name, layout) as writer:
            for part, (_, extent) in layout.items():
                count = torch.Size(extent).numel()
                started = (started + 12347) % ((1 << 27) - count + 1) if count < 1 << 27 else 0
                writer.write(part, _cut(noise, started, count).view(extent))
            writer.close()
        placed |= dict.fromkeys(layout, name)
    nbytes = _weight_bytes(layers)
    dump_index(folder, placed, nbytes)
    return nbytes


def _cut(noise: Any, start: int, count: int) -> Any:
    return noise[start : start + count] if count <= len(noise) else noise.repeat(-(-count // len(noise)))[:count]


def _measure(way: str, source: Path, folder: Path, turns: int) -> dict[str, Any]:
    """Seconds of each, turn by turn."""
    ours: list[dict[str, Any]] = []
    cp: list[float] = []
    for turn in range(turns):
        # The other one first each time: what a turn leaves behind must not always fall on the same.
        for name in ("ours", "cp") if turn % 2 else ("cp", "ours"):
            out = folder / "turn"
            os.sync()
            if name == "ours":
                ours.append(_convert(way, source, out))
            else:
                cp.append(_cp(source, out))
            shutil.rmtree(out)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    ratios = [theirs / mine["seconds"] for theirs, mine in zip(cp, ours, strict=True)]
    return {
        "bytes": nbytes,
        "ours": [mine["seconds"] for mine in ours],
        "cp": cp,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "peak_rss": max(mine["peak"] for mine in ours),
        "peak_space": max(mine["space"] for mine in ours),
        "processor": statistics.median(mine["processor"] for mine in ours),
    }


def _convert(way: str, source: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, way, str(source), str(out), str(LIMIT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    about: dict[str, Any] = json.loads(done.stdout)
    return about


def _cp(source: Path, out: Path) -> float:
    from crystal_hpc.files import fsync_path

    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for path in out.iterdir():
        fsync_path(path)
    fsync_path(out)
    return time.perf_counter() - started


def _same_weights(one: Path, other: Path) -> bool:
    """Both are written in one order, so that equal tensors make equal files, but for the header's number of shards."""
    files = [sorted(folder.glob("*.safetensors")) for folder in (one, other)]
    if len(files[0]) != len(files[1]):
        return False
    return all(filecmp.cmp(a, b, shallow=False) for a, b in zip(*files, strict=True))


def _show(figures: dict[str, Any]) -> None:
    print(
        f"{figures['bytes'] / 1e9:.2f} GB of bfloat16 weights, {figures['layers']} layers of width 4096; "
        f"there and back {'bit-equal' if figures['bit-equal'] else 'NOT EQUAL'}"
    )
    print(f"{'':<18}{'converted':>12}{'cp':>12}   ratio (median; each turn); processor time; peak memory")
    for way in ("to Megatron", "to Hugging Face"):
        found = figures[way]
        mine, theirs = (found["bytes"] / statistics.median(found[who]) / 1e9 for who in ("ours", "cp"))
        turns = " ".join(f"{ratio:.2f}" for ratio in found["ratios"])
        print(
            f"{way:<18}{mine:>7.2f} GB/s{theirs:>7.2f} GB/s   {found['ratio']:.2f} ({turns}); aim {AIM}; "
            f"{found['processor']:.0f} s; {found['peak_rss'] / 1e9:.2f} GB resident, "
            f"{found['peak_space'] / 1e9:.2f} of {LIMIT / 1e9:.1f} GB of address space"
        )


if __name__ == "__main__":
    sys.exit(main())
