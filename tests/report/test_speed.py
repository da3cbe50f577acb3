"""The report's table of speed."""

import pytest
from run_folders import MakeRun, RunFolder

from crystal_hpc.report.history import read_history, time_spent
from crystal_hpc.report.html import write_report
from crystal_hpc.report.speed import DASH, HEADS, speed_rows

PARTS = {"forward_backward": 0.5, "gradient_sync": 0.1, "optimizer": 0.15, "save_wait": 0.05, "other": 0.1}


@pytest.fixture
def measured_run(make_run: MakeRun) -> RunFolder:
    folder = make_run(prose=40)
    folder.attempt(1, ("prose", 0), ("prose", 9), lines=False)
    folder.steps(1, "prose", 0, 9, **PARTS, mfu=0.452)
    return folder


def test_a_phase_has_medians_and_the_shares_of_its_parts(measured_run: RunFolder) -> None:
    (row,) = speed_rows(read_history(measured_run.path))
    assert dict(zip(HEADS, row, strict=True)) == {
        "phase": "prose",
        "tokens/s": "512",
        "by rank": "256",
        "MFU": "45.2%",
        "a step": "1 s",
        "data wait": "10.0%",
        "forward-backward": "50.0%",
        "gradient sync": "10.0%",
        "optimizer": "15.0%",
        "wait for a save": "5.0%",
        "other": "10.0%",
    }
    page = write_report(measured_run.path).read_text()
    assert "<h2>Speed</h2>" in page and "45.2%" in page


def test_metrics_of_older_runs_are_read_and_tell_no_more_than_they_know(preempted_run: RunFolder) -> None:
    rows = speed_rows(read_history(preempted_run.path))
    assert [row[0] for row in rows] == ["prose", "code"]
    assert all(row[3] == DASH and row[5] == "10.0%" and row[6:] == [DASH] * 5 for row in rows)


def test_an_update_that_waited_for_a_save_is_not_counted_twice(measured_run: RunFolder) -> None:
    spent = time_spent(read_history(measured_run.path))
    assert spent["training"] == pytest.approx(10 * (1 - 0.1 - 0.05))


def test_a_run_without_a_step_has_no_table(make_run: MakeRun) -> None:
    folder = make_run()
    assert speed_rows(read_history(folder.path)) == []
    assert "<h2>Speed</h2>" not in write_report(folder.path).read_text()
