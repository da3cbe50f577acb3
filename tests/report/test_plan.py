"""The plan of a run: arithmetic that agrees with the order it describes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crystal_hpc.config.load import load_run
from crystal_hpc.data.catalog import rows
from crystal_hpc.data.order import run_orders
from crystal_hpc.data.sources import read_sources
from crystal_hpc.report.plan import describe_plan, make_plan


def test_a_plan_counts_what_the_order_will_hand_out(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    run = load_run(write_config(tiny_config))
    sources = read_sources(run)
    plan = make_plan(run, sources)
    for phase, order, planned in zip(run.phases, run_orders(run, sources.tokens), plan["phases"], strict=True):
        assert planned["tokens"] == planned["samples"] * phase.sequence_length
        assert sum(used["samples"] for used in planned["sources"].values()) == planned["samples"]
        consumed = order.consumed(planned["samples"])
        for name, used in planned["sources"].items():
            assert used["samples"] == consumed[name]
            assert used["epochs"] == consumed[name] / rows(sources.tokens[name], phase.sequence_length)
    assert plan["tokens"] == sum(phase["tokens"] for phase in plan["phases"])


def test_a_plan_as_text_has_a_line_for_each_phase_source_and_total(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    run = load_run(write_config(tiny_config))
    lines = describe_plan(run, make_plan(run, read_sources(run))).splitlines()
    starts = [line.split()[0] for line in lines[2:]]
    assert starts == ["prose", "prose", "code", "code", "prose", "adaptation", "code", "whole", "prose", "code"]


def test_lengthening_a_phase_leaves_the_plan_of_earlier_phases_as_it_was(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    before = load_run(write_config(tiny_config))
    after = load_run(write_config(tiny_config), ("phases.code.steps=40",))
    plans = [make_plan(run, read_sources(run))["phases"] for run in (before, after)]
    assert plans[0][0] == plans[1][0]
    assert plans[0][1] != plans[1][1]
