"""Where the time of a step goes, how fast it was, and how much memory it took.

`step` marks the ends of a step's parts, `loop` writes what comes of it into the metrics. Rank 0 alone measures, and its
numbers are of its own GPU; all other ranks have the silent clock. On a GPU the marks are CUDA events, which cost the
device nothing; they are read once, at the end of the step, when the loss is read anyway.
"""

import functools
import resource
import time
from typing import Any, Protocol

import torch

from crystal_hpc.config import derive, devices
from crystal_hpc.config.schema import Phase, Run
from crystal_hpc.model import backend

PARTS = ("forward_backward", "gradient_sync", "save_wait", "optimizer")
"""What a step is divided into, in seconds; `wait` for data comes before, and what is left of `seconds` is `other`."""


class Clock(Protocol):
    """Told where a step stands."""

    def start(self) -> None:
        """The batch is there, and the step begins."""

    def mark(self, part: str) -> None:
        """What has been done since the last mark, or the start, was this part."""

    def read(self) -> dict[str, float]:
        """Seconds by part, and `memory_*_gib`; waits until the device has done the step."""


class SilentClock:
    """Of the ranks that write no metrics."""

    def start(self) -> None:
        return None

    def mark(self, part: str) -> None:
        return None

    def read(self) -> dict[str, float]:
        return {}


class HostClock:
    """On the CPU rig, where a call returns when its work is done."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, float]] = []

    def start(self) -> None:
        self._marks = [("", time.perf_counter())]

    def mark(self, part: str) -> None:
        self._marks.append((part, time.perf_counter()))

    def read(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / devices.GIB
        return _sums(self._marks, lambda start, end: end - start) | {"memory_rss_gib": peak}


class CudaClock:
    """On a GPU. The peaks of memory are those of the step alone."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, torch.cuda.Event]] = []

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._marks.clear()
        self.mark("")

    def mark(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((part, event))

    def read(self) -> dict[str, float]:
        self._marks[-1][1].synchronize()
        return _sums(self._marks, lambda start, end: start.elapsed_time(end) / 1e3) | {
            "memory_allocated_gib": torch.cuda.max_memory_allocated() / devices.GIB,
            "memory_reserved_gib": torch.cuda.max_memory_reserved() / devices.GIB,
        }


def _sums(marks: list[tuple[str, Any]], seconds: Any) -> dict[str, float]:
    found = dict.fromkeys(PARTS, 0.0)
    for (_, start), (part, end) in zip(marks, marks[1:], strict=False):
        found[part] += seconds(start, end)
    return found


def clock(rank: int) -> Clock:
    """The clock of a rank: rank 0's measures."""
    if rank != 0:
        return SilentClock()
    return CudaClock() if backend.device().type == "cuda" else HostClock()


def speed(run: Run, phase: Phase, ranks: int, seconds: float) -> dict[str, float]:
    """Tokens a second, of all ranks and of one, and `mfu` where the peak of the device is known.

    Model FLOPs utilisation (PaLM, arXiv 2204.02311): `derive.flops_per_token` x tokens/s of a GPU / its peak
    (`config.devices`). What is recomputed does not count.
    """
    rate = derive.tokens_per_step(phase) / seconds
    found = {"tokens_per_second": rate, "tokens_per_second_per_rank": rate / ranks}
    if peak := devices.peak(_device(), run):
        found["mfu"] = derive.flops_per_token(run.model, phase.sequence_length) * rate / ranks / peak
    return found


@functools.cache
def _device() -> devices.Device | None:
    return devices.find(torch.cuda.get_device_name()) if backend.device().type == "cuda" else None
