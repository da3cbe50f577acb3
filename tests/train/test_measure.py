"""What a step's line of metrics says of speed, time and memory."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rig

from crystal_hpc import files
from crystal_hpc.config import devices
from crystal_hpc.config.load import load_run
from crystal_hpc.train import measure


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(files.read_lines(folder / "metrics.jsonl"))


@pytest.mark.parametrize("layout", [("parallel.pipeline=2",), ("parallel.distributed_optimizer=true",)])
def test_the_parts_of_a_step_make_up_its_seconds(new_run: Callable[..., Path], layout: tuple[str, ...]) -> None:
    folder = new_run("parts", *rig.SHORT, *layout)
    rig.values(rig.run_ranks(rig.train, 2, folder))
    for line in lines(folder):
        parts = {part: line[part] for part in (*measure.PARTS, "wait", "other")}
        assert all(seconds >= 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(line["seconds"], rel=1e-6)
        assert line["forward_backward"] > max(line["gradient_sync"], line["save_wait"])
        assert line["tokens_per_second"] == pytest.approx(8 * 16 / line["seconds"])
        assert line["tokens_per_second_per_rank"] == line["tokens_per_second"] / 2
        assert 0 < line["memory_rss_gib"] < 100
        assert not {"mfu", "memory_allocated_gib"} & line.keys(), "a CPU has no known peak, and no memory of a GPU"


def slow_update(job: Any, seconds: float) -> None:
    """Makes the optimizer's step longer, and says what the clocks of the ranks are."""
    step = job.trainer.optimizer.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    job.trainer.optimizer.step = slow
    silent = isinstance(job.trainer.clock, measure.SilentClock)
    assert silent == (job.layout.comm.rank != 0), "ranks that write no metrics measure nothing"


def test_time_is_booked_where_it_was_spent(new_run: Callable[..., Path]) -> None:
    folder = new_run("slow", *rig.SHORT)
    rig.values(rig.run_ranks(rig.train, 2, folder, (), slow_update, 0.1))
    assert all(line["optimizer"] >= 0.1 for line in lines(folder))


def test_utilisation_is_model_flops_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(Path(__file__).parents[2] / "configs" / "crystal-demo.yaml", ("precision=bf16",))
    monkeypatch.setattr(measure, "_device", lambda: devices.DEVICES["h100-sxm"])
    phase = run.phases[0]
    h, f, layers, vocabulary, length = 128, 341, 4, 4224, 128
    flops = 6 * (layers * (4 * h * h + 3 * h * f) + vocabulary * h) + 12 * layers * h * length
    found = measure.speed(run, phase, ranks=4, seconds=0.5)
    assert found["mfu"] == pytest.approx(flops * (16 * 128 / 0.5) / 4 / 989.4e12)
