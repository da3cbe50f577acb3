"""Two more things that `gpu.py` measures: losses on real text by number format, and the matrix products of the card."""

import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import gpu_contestants
import numpy as np
import torch
import xxhash

from crystal_hpc.config import derive, devices
from crystal_hpc.config.schema import Run
from crystal_hpc.data.batches import StepBatch
from crystal_hpc.model import backend, parallel
from crystal_hpc.train.step import build_trainer, train_step

BAND_ALL, BAND_END = 0.02, 0.01
"""How far from bfloat16's a loss may be, as a share of it: means of 20 steps from step 50 on, and of the last 50."""
WINDOW, SETTLED, END = 20, 50, 50


def real_text(least: int) -> np.ndarray:
    """At least so many bytes of this Python's own standard library, in order of name."""
    pieces, count = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        pieces.append(np.frombuffer(path.read_bytes(), np.uint8))
        count += len(pieces[-1])
        if count >= least:
            return np.concatenate(pieces)
    raise SystemExit(f"error: {sysconfig.get_path('stdlib')} has {count} bytes of Python, and {least} are needed")


def text_batches(run: Run, steps: int) -> tuple[list[StepBatch], str]:
    """Rows of text, a byte a token, dealt out so that neighbours are far apart; and a digest of them."""
    phase, micro_batch = run.phases[0], run.parallel.micro_batch
    width, count = phase.sequence_length + 1, phase.batch_size * steps
    rows = real_text(width * count)[: width * count].reshape(count, width)
    rows = rows[np.random.default_rng(1).permutation(count)].astype(np.int64)
    cut = torch.from_numpy(rows).view(steps, derive.micro_batches(run, phase, 1), micro_batch, width)
    digest = xxhash.xxh3_64_hexdigest(rows.tobytes())
    return [StepBatch(row[..., :-1].contiguous(), row[..., 1:].contiguous()) for row in cut], digest


def losses(run: Run, layout: parallel.Layout, batches: list[StepBatch]) -> list[float]:
    """Loss of each step of a model that begins with the run's own weights and follows its learning rates."""
    trainer, phase = build_trainer(run, layout), run.phases[0]
    found = [
        train_step(trainer, batch, derive.learning_rate(phase, number), [0, 0]).loss
        for number, batch in enumerate(batches)
    ]
    holders = gpu_contestants.holders_of(trainer)
    del trainer
    gpu_contestants.release(holders)
    return found


def distances(other: list[float], base: list[float]) -> tuple[float, float]:
    """The two numbers that the bands are for; of a short run, its second half stands for what has settled."""
    first = SETTLED if len(base) > 2 * SETTLED else len(base) // 2
    window = min(WINDOW, len(base) - first)
    starts = range(first, len(base) - window + 1)
    means = [[statistics.fmean(curve[at : at + window]) for at in starts] for curve in (other, base)]
    whole = max(abs(a / b - 1) for a, b in zip(*means, strict=True))
    ends = [statistics.fmean(curve[-min(END, len(base) - first) :]) for curve in (other, base)]
    return whole, abs(ends[0] / ends[1] - 1)


def ceiling(sizes: dict[str, tuple[int, int, int]], rig: bool) -> dict[str, dict[str, float]]:
    """FLOP/s of (rows x inner) times (inner x columns) on random numbers, by format and size."""
    device = backend.device()
    found: dict[str, dict[str, float]] = {"bf16": {}, "fp8": {}}
    for name, (rows, inner, columns) in sizes.items():
        left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        right = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)  # read transposed, as a weight is
        flops = 2 * rows * inner * columns
        found["bf16"][name] = flops / _seconds(lambda a=left, b=right: a @ b.t())  # type: ignore[misc]
        if not rig and torch.cuda.get_device_capability() >= (8, 9):
            found["fp8"][name] = flops / _seconds(_product_in_8_bits(left, right))
    return found


def _product_in_8_bits(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    one = torch.ones((), device=left.device)
    small_left, small_right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(
        small_left, small_right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _seconds(product: Callable[[], torch.Tensor], times: int = 30) -> float:
    for _ in range(5):
        product()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        product()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def in_words(measured: dict[str, dict[str, float]], device: devices.Device | None) -> list[str]:
    """A line for each product, with its share of the data sheet's peak where that is known."""
    lines = []
    for kind, by_size in measured.items():
        peak = getattr(device, kind, None)
        for name, rate in by_size.items():
            share = f", {rate / peak:.1%} of the data sheet" if peak else ""
            lines.append(f"matrix product {kind} {name}: {rate / devices.TERA:.3g} TFLOP/s{share}")
    return lines
