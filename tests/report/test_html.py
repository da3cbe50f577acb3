import json
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from run_folders import MakeRun, RunFolder

from crystal_hpc.errors import RunError
from crystal_hpc.report import chart
from crystal_hpc.report.history import read_history
from crystal_hpc.report.html import render, write_report

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
HOSTILE = "<script>alert('x')</script>\"]]>&amp;\x00\x1b[31m\ud800"


class Checker(HTMLParser):
    """Fails on tags that do not nest; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.said = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def check(page: str) -> Checker:
    """A page that is well formed, stands alone and holds only well-formed drawings without not-a-number."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert not checker.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not [name for name in checker.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert not re.search(r"https?:|url\(|@import", page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        for element in ElementTree.fromstring(drawing).iter():
            assert not re.search(
                r"nan|inf", "".join(element.get(name, "") for name in ("d", "x", "y", "width", "transform"))
            )
    return checker


def report(folder: RunFolder) -> Checker:
    return check(write_report(folder.path).read_text())


def test_a_finished_run_gives_one_page_that_stands_alone(preempted_run: RunFolder) -> None:
    path = write_report(preempted_run.path)
    assert path == preempted_run.path / "report.html"
    said = check(path.read_text()).said
    for word in (
        "demo",
        "Finished",
        "51.2k",
        "41,680",
        "2min 46s",
        "abc123",
        "megatron-core 0.16.1",
        "held out: prose",
    ):
        assert word in said
    assert not list(preempted_run.path.glob("*.pending"))


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_depends_on_nothing_but_the_folder_and_the_time(preempted_run: RunFolder) -> None:
    first, second = (render(read_history(preempted_run.path), NOW) for _ in range(2))
    assert first == second
    assert "Written 2026-01-02 03:04 UTC" in first


def test_interruptions_are_drawn_with_outcome_and_step(preempted_run: RunFolder) -> None:
    page = write_report(preempted_run.path).read_text()
    drawn = [element for element in re.findall(r'<g class="stop .*?</g>', page, re.DOTALL) if "<title>" in element]
    assert len(drawn) == 4  # two interruptions, in the drawing for screens and in the one for phones
    assert "attempt 1: preempted at prose 16\nSIGTERM from Slurm" in drawn[0]
    assert ">preempted, step 16</text>" in drawn[0]
    assert ">node failure, step 31</text>" in drawn[1]


def test_tokens_by_source_are_the_plans_for_finished_phases(preempted_run: RunFolder) -> None:
    page = write_report(preempted_run.path).read_text()
    plan = json.loads((preempted_run.path / "plan.json").read_text())
    for phase in plan["phases"]:
        for share in phase["sources"].values():
            assert f'title="{share["tokens"]:,}"' in page
    assert "is in progress" not in page


def test_a_phase_in_progress_is_scaled_to_what_was_reached_and_says_so(make_run: MakeRun) -> None:
    folder = make_run(prose=40, code=60)
    folder.attempt(1, ("prose", 0), ("prose", 9), outcome=None, ended=None)
    page = write_report(folder.path).read_text()
    assert "scaled to the 10 of 40 steps done" in check(page).said
    assert f'title="{40 * 512 * 0.95 / 4:,.0f}"' in page
    assert "not begun" in page


def test_held_out_losses_are_given_with_their_perplexity(preempted_run: RunFolder) -> None:
    preempted_run.evaluate("code", 60, {"prose": math.log(8), "code": 1000.0})
    said = report(preempted_run).said
    assert "2.0794 8" in said
    assert "1000.0000 inf" in said


def test_a_run_without_steps_says_so(make_run: MakeRun) -> None:
    said = report(make_run()).said
    for sentence in (
        "Not started",
        "No step has been done yet",
        "No evaluation",
        "No attempt",
        "No complete checkpoint",
    ):
        assert sentence in said


def test_nothing_from_the_folder_is_taken_for_markup(preempted_run: RunFolder) -> None:
    plan = json.loads((preempted_run.path / "plan.json").read_text())
    plan["digest"] = HOSTILE
    plan["sources"] = {HOSTILE: {"store": HOSTILE, "tokens": 5, "digest": HOSTILE}}
    for phase in plan["phases"]:
        phase["sources"] = {HOSTILE: phase["sources"]["prose"]}
    preempted_run.write("plan.json", plan)
    preempted_run.evaluate("prose", 40, {HOSTILE: 2.0})
    preempted_run.checkpoint("code", 30, HOSTILE)
    hostile: dict[str, Any] = dict.fromkeys(("reason", "outcome", "job", "commit", "backend", "signal"), HOSTILE)
    last = {"phase": HOSTILE, "step": 3}
    preempted_run.attempt(5, ("code", 59), ("code", 59), **hostile, last_step=last, versions={HOSTILE: HOSTILE},
                          startup={HOSTILE: 1.0})  # fmt: skip
    (preempted_run.path / "exports" / "<b>hf").mkdir(parents=True)
    page = write_report(preempted_run.path).read_text()
    assert "<script" not in page
    assert "<b>hf" not in page
    assert "<script>alert('x')" in check(page).said


def test_losses_that_are_not_finite_leave_a_gap_and_a_note(make_run: MakeRun) -> None:
    folder = make_run(prose=40)
    folder.steps(1, "prose", 0, 9)
    folder.steps(1, "prose", 10, 11, loss=math.nan, grad_norm=math.inf, lr=None)
    folder.steps(1, "prose", 12, 20)
    page = write_report(folder.path).read_text()
    assert "2 steps had a loss that is not finite, the first in phase prose, step 10" in check(page).said
    curve = re.search(r'class="smooth" d="([^"]+)"/><rect', page)
    assert curve is not None
    assert curve[1].count("M") == 2


@pytest.mark.parametrize(
    "fields", [{"loss": math.nan}, {"loss": 0.0, "lr": 0.0}, {"seconds": math.nan, "time": math.inf}]
)
def test_degenerate_numbers_still_give_a_report(make_run: MakeRun, fields: dict[str, Any]) -> None:
    folder = make_run(prose=40)
    folder.steps(1, "prose", 0, 0, **fields)
    folder.attempt(1, ("prose", 0), ("prose", 0), lines=False, ended=None, outcome=None, started=1e300)
    report(folder)


def test_a_steep_start_does_not_flatten_the_rest_and_is_said_to_be_cut_off(make_run: MakeRun) -> None:
    folder = make_run(prose=1000)
    folder.steps(1, "prose", 0, 4, loss=90.0)
    folder.steps(1, "prose", 5, 999)
    history = read_history(folder.path)
    assert chart.loss_range(history)[1] < 10
    assert re.search(r"\d steps with a loss above \S+ \(up to 90\) drawn at the upper edge", report(folder).said)


def test_a_held_out_loss_above_the_curve_is_still_inside_the_chart(preempted_run: RunFolder) -> None:
    preempted_run.evaluate("code", 60, {"prose": 2.45, "code": 7.5})
    assert chart.loss_range(read_history(preempted_run.path))[1] > 7.5


def test_three_hundred_thousand_steps_stay_under_a_megabyte(make_run: MakeRun) -> None:
    folder = make_run(prose=100_000, code=200_000)
    for number, (phase, first, last) in enumerate(
        (("prose", 0, 60_000), ("prose", 60_001, 99_999), ("code", 0, 150_000), ("code", 140_000, 199_999)), start=1
    ):
        folder.attempt(number, (phase, first), (phase, last), outcome="finished" if last % 2 else "preempted")
    path = write_report(folder.path)
    assert path.stat().st_size < 500_000
    assert "300,000" in check(path.read_text()).said


def test_thinning_keeps_the_peaks_and_the_last_step(make_run: MakeRun) -> None:
    folder = make_run(prose=20_000)
    folder.steps(1, "prose", 0, 12_344)
    folder.steps(1, "prose", 12_345, 12_345, loss=77.0)
    folder.steps(1, "prose", 12_346, 19_999)
    steps = read_history(folder.path).steps
    kept = chart.thin(steps, lambda step: step.loss, 2000)
    assert len(kept) <= 2050
    assert max(step.loss for step in kept) == 77.0
    assert kept[-1] is steps[-1]
    assert [step.step for step in kept] == sorted({step.step for step in kept})


def test_the_running_mean_is_centred_and_starts_anew_in_each_phase(make_run: MakeRun) -> None:
    folder = make_run(prose=20, code=20)
    for step in range(20):
        folder.steps(1, "prose", step, step, loss=float(step))
    folder.steps(1, "code", 0, 19, loss=100.0)
    means = chart.running_mean(read_history(folder.path).steps)
    assert means == pytest.approx([*map(float, range(20)), *([100.0] * 20)])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.1, 2.2, [2.1, 2.12, 2.14, 2.16, 2.18, 2.2]),
        (3, 3, [3]),
        (0, math.inf, [0]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert chart.nice_ticks(low, high, 5) == pytest.approx(ticks)


def test_a_stacked_bar_shares_out_its_width() -> None:
    bar = ElementTree.fromstring(chart.stacked_bar([("a", 1.0, "t0"), ("none", 0.0, "t1"), ("b", 3.0, "t2")], "parts"))
    assert [(part.get("x"), part.get("width")) for part in bar] == [("0.000%", "25.000%"), ("25.000%", "75.000%")]
    assert chart.stacked_bar([("a", 0.0, "t0")], "nothing") == ""
