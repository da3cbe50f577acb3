"""benchmarks/gpu.py without a GPU: says so in a line, and runs at toy size on the CPU rig."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: no GPU here; --rig shows at toy size, on the CPU, that all of this runs"
    ]


def test_on_the_cpu_rig_all_of_it_runs_that_needs_no_gpu(tmp_path: Path) -> None:
    done = run("--rig", "--quick", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    shape = figures["shapes"]["160m"]
    assert set(shape["contestants"]) == {"ours bf16", "megatron bf16", "plain bf16"}
    assert set(shape["ratios"]) == {"ours bf16 / megatron bf16", "ours bf16 / plain bf16"}
    assert shape["contestants"]["ours bf16"]["used"].startswith("CPU rig: bf16; layers megatron")
    assert set(figures["losses"]["apart"]) == {"fp32"}
    assert [len(curve) for curve in figures["losses"]["curves"].values()] == [20, 20]
    assert figures["matrix_products"]["bf16"]["toy"] > 0
    assert figures["failed"] == {}
    assert figures["aims"] == {"all of it ran": [True, True]}, "nothing is claimed of a rig"
    assert "measures nothing" in done.stdout
