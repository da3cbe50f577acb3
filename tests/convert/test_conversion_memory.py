"""Conversions take the memory of a few tensors, whatever the size of the model: tried under a limit (RLIMIT_AS)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trained_runs import REPOSITORY

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Model
from crystal_hpc.convert import from_hf, memory, weights
from crystal_hpc.convert.names import Shape, published_sizes, size
from crystal_hpc.convert.safetensors_io import SafetensorsWriter
from crystal_hpc.convert.shapes import as_run
from crystal_hpc.errors import CheckpointError

MODEL = Model(layers=40, hidden=512, heads=8, ffn=1365, vocab_size=1000, rotary_fraction=0.5)
LARGEST = 4 * 2 * 1365 * 512  # bytes of a linear_fc1
# Blocks, threads and their stacks, the allocator's own; the model must not fit into what is left.
CONSTANT = 48 << 20
LIMIT = CONSTANT + 6 * LARGEST

CHILD = """
import json, resource, sys
from pathlib import Path
from crystal_hpc.convert import from_hf, weights
from crystal_hpc.convert.reader import CheckpointReader, run_of

what, source, out, more = sys.argv[1:]
resident = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (resident() + int(more),) * 2)
if what == "export":
    weights.export(Path(source), run_of(Path(source)), None, Path(out), "float32", 10**9)
elif what == "import":
    with from_hf.opened(Path(source)) as opened:
        from_hf.convert(opened, Path(out), shard_bytes=10**9)
else:
    reader = CheckpointReader(Path(source), run_of(Path(source)))
    held = [reader.read(name) for name in reader.names()]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder / hf`: many times as many weights as a conversion may take memory; `folder / weights`: the same."""
    folder = tmp_path_factory.mktemp("large")
    shape = Shape(MODEL)
    layout = {
        name: (torch.float32, sizes)
        for entry in weights.FORMAT.entries(shape)
        for name, sizes in zip(entry.published, published_sizes(entry, shape), strict=True)
    }
    (folder / "hf").mkdir()
    config = weights.FORMAT.published_config(as_run(shape, 64, "fp32"))
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    noise = torch.randn(LARGEST // 4, generator=torch.Generator().manual_seed(2))
    with SafetensorsWriter(folder / "hf" / "model.safetensors", layout) as writer:
        for name, (_, sizes) in layout.items():
            writer.write(name, noise[: torch.Size(sizes).numel()].view(sizes))
        writer.close()
    with from_hf.opened(folder / "hf") as source:
        from_hf.convert(source, folder / "weights")
    return folder


def child(what: str, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    words = [sys.executable, "-c", CHILD, what, str(source), str(out), str(LIMIT)]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_the_model_is_many_times_as_large_as_the_memory_there_is() -> None:
    assert 4 * derive.parameters(MODEL) > 5 * LIMIT
    assert 4 * torch.Size(size(MODEL, "decoder.layers.0.mlp.linear_fc1.weight")).numel() == LARGEST


@pytest.mark.parametrize("what", ["export", "import"])
def test_a_conversion_takes_the_memory_of_a_few_tensors(what: str, folder: Path, tmp_path: Path) -> None:
    done = child(what, folder / ("weights" if what == "export" else "hf"), tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out").is_dir()


def test_whoever_held_the_whole_model_would_fail_there(folder: Path, tmp_path: Path) -> None:
    done = child("hold", folder / "weights", tmp_path / "out")
    assert done.returncode != 0 and "memory" in done.stderr


def test_logits_that_would_not_fit_are_refused_before_the_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = MODEL.model_copy(update={"layers": 1000, "hidden": 16384, "ffn": 43690})
    with pytest.raises(CheckpointError, match=r"takes about .* GB of memory, and .* \(--verify weights\)") as caught:
        memory.check_room_for_logits(huge)
    assert "\n" not in str(caught.value)
    memory.check_room_for_logits(MODEL.model_copy(update={"layers": 1}))
    monkeypatch.setattr(memory, "address_space", lambda: 1 << 30)
    with pytest.raises(CheckpointError, match=r"GB of address space \(ulimit -v\), and 1\.1 GB are free"):
        memory.check_room_for_logits(MODEL)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_job_counts_and_the_cache_of_files_does_not(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, line = (tmp_path / "memory", "4:cpu,memory:") if version == 1 else (tmp_path, "0::")
    limit, used = [("limit_in_bytes", "usage_in_bytes"), ("max", "current")][version - 1]
    total = "total_" if version == 1 else ""
    job = root / "slurm" / "job_7"
    step = job / "step_0"
    step.mkdir(parents=True)
    unlimited = "9223372036854771712" if version == 1 else "max"
    for folder, most, now, cache in ((job, str(100 << 20), 90 << 20, 50 << 20), (step, unlimited, 80 << 20, 0)):
        (folder / f"memory.{limit}").write_text(f"{most}\n")
        (folder / f"memory.{used}").write_text(f"{now}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{total}inactive_file {cache - 1}\n{total}active_file 1\n")
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{line}/slurm/job_7/step_0\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
    assert memory.available() == 60 << 20
    (tmp_path / "own").write_text(f"{line}/seen/from/outside/a/container\n")
    assert (memory.available() or 0) > 60 << 20, "of the machine"
