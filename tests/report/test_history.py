import math
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import MakeRun, RunFolder

from crystal_hpc.errors import RunError
from crystal_hpc.report.history import read_history, state, time_spent
from crystal_hpc.report.records import Position


def test_a_folder_that_is_missing_or_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="no run folder") as caught:
            read_history(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "plan", ["{", "[]", '{"phases": []}', '{"sources": {}, "digest": "d", "phases": [{"name": 1}]}']
)
def test_a_damaged_plan_is_refused_in_one_line(make_run: MakeRun, plan: str) -> None:
    folder = make_run().path
    (folder / "plan.json").write_text(plan)
    with pytest.raises(RunError, match=r"plan\.json: not a plan") as caught:
        read_history(folder)
    assert "\n" not in str(caught.value)


def test_a_run_not_yet_started_is_read_as_its_plan(make_run: MakeRun) -> None:
    history = read_history(make_run(prose=40, code=60).path)
    assert [(phase.name, phase.start, phase.steps) for phase in history.phases] == [
        ("prose", 0, 40),
        ("code", 20480, 60),
    ]
    assert (history.tokens, history.complete, history.steps, history.notes) == (0, False, [], [])
    assert time_spent(history) == {}


def test_every_step_counts_once_and_the_later_attempt_is_the_one_that_counts(preempted_run: RunFolder) -> None:
    history = read_history(preempted_run.path)
    assert [(step.phase, step.step) for step in history.steps] == [
        *(("prose", step) for step in range(40)),
        *(("code", step) for step in range(60)),
    ]
    assert sorted(step.step for step in history.redone) == list(range(20, 32))
    assert {step.attempt for step in history.redone} == {3}
    assert history.complete
    assert history.tokens == 100 * 512


def test_a_later_attempt_undoes_also_what_it_has_not_reached_again(make_run: MakeRun) -> None:
    folder = make_run(prose=40)
    folder.steps(1, "prose", 0, 30)
    folder.steps(2, "prose", 10, 12)
    history = read_history(folder.path)
    assert history.steps_done(history.phases[0]) == 13
    assert len(history.redone) == 21


def test_late_lines_of_an_older_attempt_do_not_displace_a_newer_one(make_run: MakeRun) -> None:
    folder = make_run(prose=40)
    folder.steps(2, "prose", 0, 9)
    folder.steps(1, "prose", 0, 4)
    history = read_history(folder.path)
    assert {step.attempt for step in history.steps} == {2}
    assert len(history.steps) == 10


def test_a_torn_last_line_is_left_out(make_run: MakeRun) -> None:
    folder = make_run(prose=40)
    folder.steps(1, "prose", 0, 5)
    whole = (folder.path / "metrics.jsonl").read_text()
    (folder.path / "metrics.jsonl").write_text(whole[:-25])
    assert len(read_history(folder.path).steps) == 5


def test_lines_that_are_no_step_and_steps_without_a_line_are_noted(make_run: MakeRun) -> None:
    folder = make_run(prose=40)
    folder.steps(1, "prose", 0, 5)
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "elsewhere"}\n{"phase": "prose", "step": "x"}\n')
    folder.steps(1, "prose", 8, 9)
    notes = read_history(folder.path).notes
    assert notes == [
        "metrics.jsonl: 2 lines are no step of this run and were left out",
        "metrics.jsonl: 2 steps were done without leaving a readable line",
    ]


@pytest.mark.parametrize("record", ['{"attempt"', "[]", '{"attempt": 2}', '{"attempt": Infinity, "started": 1}'])
def test_a_damaged_record_is_left_out_and_noted(preempted_run: RunFolder, record: str) -> None:
    (preempted_run.path / "attempts" / "0002.json").write_text(record)
    history = read_history(preempted_run.path)
    assert [attempt.number for attempt in history.attempts] == [1, 3, 4]
    assert len(history.notes) == 1
    assert history.notes[0].startswith("attempts/0002.json: not understood")


def test_only_committed_checkpoints_are_read_in_the_order_of_training(preempted_run: RunFolder) -> None:
    (preempted_run.path / "checkpoints" / "code" / "step_00000050").mkdir()
    preempted_run.write("checkpoints/code/step_00000055.pending/manifest.json", {})
    preempted_run.write("checkpoints/code/step_00000056.pruned/manifest.json", {})
    history = read_history(preempted_run.path)
    found = [(checkpoint.phase, checkpoint.step) for checkpoint in history.checkpoints]
    assert found == [("prose", 17), ("prose", 40), ("code", 20), ("code", 60)]
    assert {checkpoint.bytes for checkpoint in history.checkpoints} == {3_000_000}
    assert history.notes == []


def test_a_loss_that_is_null_or_not_finite_is_kept_as_such(make_run: MakeRun) -> None:
    folder = make_run(prose=40)
    folder.steps(1, "prose", 0, 0, loss=None)
    folder.steps(1, "prose", 1, 1, loss=math.nan)
    folder.steps(1, "prose", 2, 2, loss=math.inf)
    assert [str(step.loss) for step in read_history(folder.path).steps] == ["nan", "nan", "inf"]


def test_attempts_keep_their_first_and_last_step_and_outcome(preempted_run: RunFolder) -> None:
    first = read_history(preempted_run.path).attempts[0]
    assert (first.first_step, first.last_step) == (Position("prose", 0), Position("prose", 16))
    assert (first.ending, first.signal, first.signal_to_durable) == ("preempted", "SIGTERM", 0.8)


def test_the_time_spent_adds_up_to_the_wall_time(preempted_run: RunFolder) -> None:
    history = read_history(preempted_run.path)
    spent = time_spent(history)
    last = history.attempts[-1].ended
    assert last is not None
    assert math.fsum(spent.values()) == pytest.approx(last - history.attempts[0].started)
    assert spent == pytest.approx(
        {"training": 90, "data wait": 10, "steps redone": 12, "start-up": 16, "saving": 2, "other": 6,
         "between attempts": 30}
    )  # fmt: skip


def test_an_attempt_that_never_reached_a_step_is_all_start_up(make_run: MakeRun) -> None:
    folder = make_run(prose=40)
    folder.attempt(1, ("prose", 0), ("prose", 0), lines=False, outcome="code_error", first_step=None, last_step=None)
    assert time_spent(read_history(folder.path))["start-up"] == pytest.approx(6)


def test_the_state_of_a_run_is_one_sentence(make_run: MakeRun) -> None:
    folder = make_run(prose=40, code=60)
    assert state(read_history(folder.path)) == "Not started: no attempt has been recorded."
    folder.attempt(1, ("prose", 0), ("prose", 16), outcome="preempted", reason="SIGTERM from Slurm")
    said = "Stopped in phase prose after 17 of 40 steps (preempted): SIGTERM from Slurm"
    assert state(read_history(folder.path)) == said
    folder.attempt(2, ("prose", 17), ("prose", 39))
    assert state(read_history(folder.path)) == "Waiting for its next phase, in phase prose after 40 of 40 steps."
    folder.attempt(3, ("code", 0), ("code", 20), outcome=None, ended=None)
    assert state(read_history(folder.path)).startswith(
        "Running in phase code after 21 of 60 steps; last sign of life 20"
    )
    folder.attempt(4, ("code", 21), ("code", 59))
    assert state(read_history(folder.path)) == "Finished: every phase is done."


def test_a_report_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, crystal_hpc.report.html; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
