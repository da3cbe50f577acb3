"""The plan of a run: arithmetic that agrees with the order it describes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Phase, Run
from crystal_hpc.data.catalog import rows
from crystal_hpc.data.order import run_orders
from crystal_hpc.data.sources import read_sources, survey_sources
from crystal_hpc.report.plan import describe_plan, make_plan

# Reads prose more than once in its first phase, and code in rows of another length in the last.
LONG = ("phases.prose.steps=400", "phases.code.steps=60", "phases.adaptation.sequence_length=32")


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


def counted(run: Run, tokens: dict[str, int]) -> Iterator[tuple[Phase, str, int, list[int]]]:
    """(phase, source, samples, positions that give a row again), by reading every sample of every phase."""
    seen: set[tuple[str, int, int]] = set()
    for phase, order in zip(run.phases, run_orders(run, tokens), strict=True):
        source, _, row = order.samples(np.arange(derive.phase_samples(phase)))
        samples: dict[str, int] = dict.fromkeys(order.sources, 0)
        again: dict[str, list[int]] = {name: [] for name in order.sources}
        for position, (s, r) in enumerate(zip(source.tolist(), row.tolist(), strict=True)):
            name, key = order.sources[s], (order.sources[s], phase.sequence_length, r)
            samples[name] += 1
            again[name] += [position] if key in seen else []
            seen.add(key)
        for name in order.sources:
            yield phase, name, samples[name], again[name]


def test_epochs_and_repeats_are_those_that_reading_everything_finds(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    run = load_run(write_config(tiny_config), LONG)
    sources = read_sources(run)
    plan = make_plan(run, sources)
    planned = {phase["name"]: phase["sources"] for phase in plan["phases"]}
    epochs = dict.fromkeys(sources.tokens, 0.0)
    for phase, name, samples, again in counted(run, sources.tokens):
        used = planned[phase.name][name]
        assert used["samples"] == samples
        assert used["repeated_samples"] == len(again)
        assert used["first_repeat_step"] == (again[0] // phase.batch_size if again else None)
        assert used["epochs_before"] == epochs[name]
        epochs[name] += samples / rows(sources.tokens[name], phase.sequence_length)
        assert used["epochs_after"] == epochs[name]
    assert {name: source["epochs"] for name, source in plan["sources"].items()} == epochs
    repeats = [used["first_repeat_step"] for phase in planned.values() for used in phase.values()]
    assert None in repeats and set(repeats) - {None, 0}, "the run is to have repeats from the middle of a phase, too"


def test_the_text_says_from_where_a_source_repeats_and_what_another_sequence_length_means(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    run = load_run(write_config(tiny_config), LONG)
    plan = make_plan(run, read_sources(run))
    text = describe_plan(run, plan)
    used = plan["phases"][0]["sources"]["prose"]
    step = f"{used['first_repeat_step']:,}"
    (row,) = [line for line in text.splitlines() if line.startswith("  prose") and line.endswith(f"step {step}")]
    assert row.split()[-4:-2] == [f"{used['epochs']:.2f}", f"{used['epochs_after']:.2f}"]
    assert f"note  prose: prose runs dry at step {step} of 400: {used['epochs']:.2f} epochs wanted, 1.00 unread" in text
    assert "note  adaptation: rows of 32 tokens have an order of their own" in text
    assert "are in rows read before" in text
    assert max(map(len, text.splitlines())) <= 100
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_plan_that_repeats_nothing_has_no_notes(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    run = load_run(write_config(tiny_config))
    plan = make_plan(run, read_sources(run))
    assert "note" not in describe_plan(run, plan)
    assert all(used["first_repeat_step"] is None for phase in plan["phases"] for used in phase["sources"].values())


def test_without_a_store_all_but_its_epochs_is_planned(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    whole = load_run(write_config(tiny_config))
    known = make_plan(whole, read_sources(whole))
    tiny_config["data"]["sources"]["code"] = "nowhere"
    run = load_run(write_config(tiny_config))
    sources, problems = survey_sources(run)
    assert [problem.split(":")[0] for problem in problems] == ["data.sources.code"]
    plan = make_plan(run, sources)
    for planned, before in zip(plan["phases"], known["phases"], strict=True):
        for name, used in planned["sources"].items():
            unknown = {"epochs": None, "epochs_before": None, "epochs_after": None, "first_repeat_step": None}
            assert used == before["sources"][name] | (unknown if name == "code" else {})
    assert plan["sources"]["code"] == {"store": "nowhere", "tokens": None, "digest": None, "epochs": None}
    (last,) = [line for line in describe_plan(run, plan).splitlines() if line.endswith("missing")]
    assert last.split()[0] == "code" and "?" in last
