"""How a job goes on: tables of attempts, and what becomes of the job after the last."""

from typing import Any

import pytest

from crystal_hpc.jobs import journal
from crystal_hpc.jobs.slurm import AT_WORK, OVER, WAITING
from crystal_hpc.jobs.verdict import Next, judge, nodes_to_exclude, without_progress

Entry = dict[str, Any]


def ended(outcome: str | None, saved: int | None = None, mistake: bool = False, blamed: str = "") -> Entry:
    """An attempt that ended so, and saved at that step."""
    checkpoint = None if saved is None else {"phase": "code", "step": saved}
    reason = f"this is why: {outcome}"
    fields = {"last_checkpoint": checkpoint, "mistake": mistake, "blamed": blamed.split()}
    return {"outcome": outcome, "reason": reason, **fields}


LOST, TIMED_OUT, PREEMPTED = ended("node_failure"), ended("time_limit"), ended("preempted")


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        # However it ended, there is a next time,
        ([ended("preempted", 10)], Next.AGAIN),
        ([ended("time_limit", 10)], Next.AGAIN),
        ([ended("node_failure")], Next.AGAIN),
        ([ended("out_of_memory")], Next.AGAIN),
        ([ended("code_error")], Next.AGAIN),
        # but a user's mistake would only be made again,
        ([ended("code_error", mistake=True)], Next.STOP),
        ([ended("code_error", 10, mistake=True)], Next.STOP),
        # and the third failure without progress is the last.
        ([LOST, LOST], Next.AGAIN),
        ([LOST, LOST, LOST], Next.STOP),
        ([LOST, TIMED_OUT, ended("out_of_memory")], Next.STOP),
        ([TIMED_OUT] * 3, Next.STOP),
        # Who is preempted before the first save has done nothing wrong,
        ([PREEMPTED] * 50, Next.AGAIN),
        ([LOST, LOST, *[PREEMPTED] * 5], Next.AGAIN),
        # but has not made any progress, either.
        ([LOST, PREEMPTED, LOST, PREEMPTED, LOST], Next.STOP),
        ([LOST, LOST, ended("node_failure", 10), LOST, LOST], Next.AGAIN),
        ([LOST, LOST, ended("node_failure", 10), LOST, LOST, LOST], Next.STOP),
        # To save again what was saved before is no progress: a checkpoint must be a new one.
        ([ended("time_limit", 10)] * 3, Next.AGAIN),
        ([ended("time_limit", 10)] * 4, Next.STOP),
    ],
)
def test_a_running_job_goes_on_unless_it_would_only_fail_again(attempts: list[Entry], expected: Next) -> None:
    verdict = judge(attempts, phase_done=False, job_state="RUNNING", cancelled=False)
    assert verdict.next is expected
    assert attempts[-1]["reason"] in verdict.reason


def test_a_stop_for_want_of_progress_says_how_often_and_why() -> None:
    verdict = judge([LOST, LOST, LOST, LOST], phase_done=False, job_state="RUNNING", cancelled=False)
    assert verdict.reason == "4 attempts without progress, the last: this is why: node_failure"


@pytest.mark.parametrize("attempts", [[ended("finished", 10)], [ended("node_failure", 10)], [LOST] * 4])
@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED", "COMPLETING", "UNKNOWN"])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_phase_that_is_done_is_done_whatever_else_happened(
    attempts: list[Entry], state: str, cancelled: bool
) -> None:
    assert judge(attempts, phase_done=True, job_state=state, cancelled=cancelled).next is Next.DONE


@pytest.mark.parametrize("state", sorted((WAITING | AT_WORK | OVER | {"UNKNOWN"}) - {"RUNNING"}))
def test_a_job_about_which_slurm_has_decided_is_left_to_it(state: str) -> None:
    for attempts in ([PREEMPTED], [LOST] * 5, [ended("code_error", mistake=True)]):
        verdict = judge(attempts, phase_done=False, job_state=state, cancelled=False)
        assert (verdict.next, verdict.reason) == (Next.LEAVE, f"Slurm says {state}")


@pytest.mark.parametrize("last", [ended("cancelled", 10), PREEMPTED, LOST, ended("code_error", mistake=True)])
def test_a_cancelled_run_does_not_go_on_by_itself(last: Entry) -> None:
    verdict = judge([LOST, LOST, last], phase_done=False, job_state="RUNNING", cancelled=True)
    assert (verdict.next, verdict.reason) == (Next.LEAVE, "cancelled by the user")


@pytest.mark.parametrize("outcome", journal.OUTCOMES)
def test_every_outcome_of_the_journal_has_a_verdict(outcome: str) -> None:
    assert judge([ended(outcome)], False, "RUNNING", False).next in Next


@pytest.mark.parametrize(
    ("attempts", "count"),
    [
        ([], 0),
        ([PREEMPTED, ended("cancelled"), ended(None)], 0),
        ([LOST, TIMED_OUT, ended("code_error"), ended("out_of_memory")], 4),
        ([LOST, ended("time_limit", 5), LOST], 1),
        ([LOST, ended("finished"), LOST, LOST], 2),
        ([LOST, ended("finished", 5)], 0),
        ([ended("time_limit", 5), ended("time_limit", 5), LOST], 2),
        ([ended("time_limit", 5), PREEMPTED, ended("preempted", 5), LOST], 1),
    ],
)
def test_failures_are_counted_since_the_last_attempt_that_saved_anything_new(attempts: list[Entry], count: int) -> None:
    assert len(without_progress(attempts)) == count


def test_the_same_step_of_another_phase_is_progress() -> None:
    other = {**ended("time_limit"), "last_checkpoint": {"phase": "prose", "step": 5}}
    assert without_progress([LOST, other, LOST, ended("time_limit", 5)]) == []


@pytest.mark.parametrize(
    ("blamed", "excluded"),
    [
        ([], []),
        (["n1"], []),
        (["n1", "n2"], []),
        (["n1", "", "n1"], ["n1"]),
        (["n1 n1"], []),
        (["n2 n1", "n1", "n2 n3"], ["n1", "n2"]),
    ],
)
def test_a_node_is_left_out_once_it_took_the_blame_for_two_attempts(blamed: list[str], excluded: list[str]) -> None:
    assert nodes_to_exclude([ended("node_failure", blamed=nodes) for nodes in blamed]) == excluded


def test_attempts_of_before_there_was_any_blame_are_read_too() -> None:
    old = {key: value for key, value in LOST.items() if key != "blamed"}
    assert nodes_to_exclude([old, old]) == []
