"""When a run is saved, what is in it, and what becomes of a save under way when a signal comes or weights are stale.

Real runs in processes of their own; `prepare` functions slow a writer down or break something inside them.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import breaking
import pytest
import torch
from rig import SHORT, Trained, branch, generation, join, run_ranks, short_run, state_saved, steps_saved, train, values

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train import checkpoint, preemption, record, writing
from crystal_hpc.train.manifest import read_manifest

NewRun = Callable[..., Path]


def attempt(folder: Path, prepare: Callable[..., None] | None = None, *more: Any, size: int = 1) -> Trained:
    """One attempt, as rank 0 saw it."""
    found: Trained = values(run_ranks(train, size, folder, [], prepare, *more))[0]
    return found


def assert_same_states(folder: Path, origin: Path, steps: tuple[int, ...] = (1, 2, 4)) -> None:
    """The save after step 3 is given up where it is still at its beginning when the phase ends."""
    for step in steps:
        assert state_saved(generation(folder, step)) == state_saved(generation(origin, step)), f"step {step}"


# Asynchronous saves


@pytest.mark.parametrize("size", [1, 2])
def test_a_generation_saved_while_training_goes_on_is_bit_equal_to_one_saved_while_it_waits(
    new_run: NewRun, tmp_path: Path, size: int
) -> None:
    origin = short_run(new_run, size)
    folder = branch(origin, tmp_path / "asynchronous", 0)
    seen = attempt(folder, breaking.slow_writing, 0.3, 0.5, size=size)
    assert_same_states(folder, origin)
    at = seen.events.index
    assert at(("saving", 0, 1)) < at(("step", 0, 1)) < at(("saved", 0, 1)), "the second step came between"
    for step in (1, 2, 4):
        ours, theirs = (read_manifest(generation(run, step)) for run in (folder, origin))
        for name in ("tensors", "ledger", "optimizer", "weights", "layout", "step", "tokens", "files"):
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_while_rank_0_completes_a_generation(new_run: NewRun, size: int) -> None:
    rules = SHORT[0].replace("steps: 4", "steps: 20").replace("checkpoint_every: 1", "checkpoint_every: 8")
    at = attempt(new_run("completed", rules), breaking.slow_completion, 12, size=size).events.index
    assert at(("step", 0, 10)) < at(("saved", 0, 8))


def counting_writers(job: Any) -> None:
    """Writes down, whenever a writer is started, how many are at work."""
    starting = writing.RankWriter.start

    def start(writer: Any) -> None:
        at_work = sum(thread.name == "checkpoint-writer" for thread in threading.enumerate())
        with open(job.folder / "writers", "a") as file:
            file.write(f"{at_work}\n")
        starting(writer)

    writing.RankWriter.start = start
    breaking.slow_writing(job, 0.5, 0.5)


def test_at_most_one_save_is_under_way(new_run: NewRun, tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "slow", 0)
    attempt(folder, counting_writers)
    assert (folder / "writers").read_text().split() == ["0", "0", "0"]


def no_waiting(job: Any, seconds: float) -> None:
    breaking.slow_copy(job, seconds)
    writing.RankWriter.wait_until_copied = lambda _writer: None


def test_the_optimizer_waits_for_the_copy_of_the_state(new_run: NewRun, tmp_path: Path) -> None:
    origin = short_run(new_run)
    folder = branch(origin, tmp_path / "waits", 0)
    attempt(folder, breaking.slow_copy, 2.0)
    assert_same_states(folder, origin)
    waits = [float(line) for line in (folder / "waited").read_text().split()]
    assert len(waits) == 3 and max(waits) > 0.1

    careless = branch(origin, tmp_path / "careless", 0)
    attempt(careless, no_waiting, 2.0)
    with pytest.raises(AssertionError, match="step 1"):  # this is what it would come to without
        assert_same_states(careless, origin)


def signal_while_writing(job: Any, part: float) -> None:
    breaking.slow_writing(job, 3.0, part)  # longer than a step takes
    breaking.stop_in_step(job, 2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("part", "left"), [(0.1, [2]), (0.8, [1, 2])])
def test_a_save_under_way_when_a_signal_comes_is_given_up_at_its_beginning_and_finished_at_its_end(
    new_run: NewRun, tmp_path: Path, size: int, part: float, left: list[int]
) -> None:
    origin = short_run(new_run, size)
    folder = branch(origin, tmp_path / "signalled", 0)
    seen = attempt(folder, signal_while_writing, part, size=size)
    assert (seen.stop, seen.ended) == ("TIME_LIMIT", (0, 2))
    assert steps_saved(folder) == [f"prose/step_{step:08d}" for step in left]
    assert read_manifest(generation(folder, 2)).why == "time limit"
    assert attempt(folder, size=size).began == (0, 2)
    assert_same_states(folder, origin, (*left, 4))


def sick_while_signalled(job: Any) -> None:
    breaking.sick_storage(job)
    signal_while_writing(job, 0.8)


@pytest.mark.parametrize("size", [1, 2])
def test_a_storage_that_fails_costs_a_periodic_save_and_not_the_one_on_a_signal(
    new_run: NewRun, tmp_path: Path, size: int
) -> None:
    origin = short_run(new_run, size)
    folder = branch(origin, tmp_path / "sick", 0)
    assert attempt(folder, breaking.sick_storage, size=size).stop == "NO"
    assert f"prose/step_{1:08d}" not in steps_saved(folder)
    assert_same_states(folder, origin, (4,))
    folder = branch(origin, tmp_path / "sick-and-signalled", 0)
    assert attempt(folder, sick_while_signalled, size=size).stop == "TIME_LIMIT"
    assert steps_saved(folder) == ["prose/step_00000002"]
    assert_same_states(folder, origin, (2,))


def bombarded(job: Any, number: int) -> None:
    """A group of its own, which gets signals from when the first save is half written until long after its end."""
    os.setpgrp()
    job.flag = preemption.watch()

    def shoot() -> None:
        for _ in range(20):
            os.killpg(0, number)
            time.sleep(0.02)

    breaking.slow_writing(job, 0.2, 0.5, lambda: threading.Thread(target=shoot, daemon=True).start())


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, "PREEMPTED"), (signal.SIGUSR2, "TIME_LIMIT")])
@pytest.mark.parametrize("size", [1, 2])
def test_signals_to_the_whole_process_group_do_not_break_a_save(
    new_run: NewRun, tmp_path: Path, size: int, number: int, told: str
) -> None:
    origin = short_run(new_run, size)
    folder = branch(origin, tmp_path / "bombarded", 0)
    seen = attempt(folder, bombarded, number, size=size)
    assert seen.stop in (told, "NO") and steps_saved(folder)[-1] == f"prose/step_{seen.ended[1]:08d}"
    attempt(folder, size=size)
    assert not (folder / "quarantine").exists()
    assert_same_states(folder, origin, (seen.ended[1], 4))


# When there is a save


PHASE_ENDS = ["adaptation/step_00000003", "code/step_00000004", "prose/step_00000005"]


def test_the_end_of_each_phase_and_every_so_many_steps_are_saved(new_run: NewRun) -> None:
    folder = new_run("phases")
    attempt(folder)
    assert steps_saved(folder) == sorted([*PHASE_ENDS, "code/step_00000002"])
    whys = {name: read_manifest(folder / "checkpoints" / name).why for name in steps_saved(folder)}
    assert whys == dict.fromkeys(PHASE_ENDS, "phase end") | {"code/step_00000002": "periodic"}


def ten_seconds_a_step(job: Any) -> None:
    """A clock of its own for the saver: every step takes ten seconds."""
    now, beat = 0.0, job.beat

    def listen(doing: str, step: bool = False) -> None:
        nonlocal now
        now += 10.0 * step
        beat(doing, step=step)

    job.beat = listen
    checkpoint.time = SimpleNamespace(monotonic=lambda: now, time=time.time, perf_counter=time.perf_counter)


def test_time_that_has_passed_is_a_reason_to_save(new_run: NewRun) -> None:
    folder = new_run("by-the-clock", "phases.0.checkpoint_every=null", "checkpoints.every=25s")
    attempt(folder, ten_seconds_a_step)
    # The third step begins when 30 s have passed, counting the first; the ends of phases count from zero again.
    assert steps_saved(folder) == sorted([*PHASE_ENDS, "prose/step_00000003", "code/step_00000002"])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", None),
        (b"before the change\n", "before the change"),
        ("vor der Änderung".encode(), "vor der Änderung"),
        (b"two\nlines\n", None),
        (bytes(range(256)), None),
        (b"x" * 500, None),
    ],
)
def test_a_trigger_file_asks_for_a_save_and_what_is_in_it_names_it(
    new_run: NewRun, tmp_path: Path, content: bytes, name: str | None
) -> None:
    folder = branch(short_run(new_run), tmp_path / "asked", 0)
    (folder / "save").write_bytes(content)
    attempt(folder)
    assert read_manifest(generation(folder, 1)).why == "asked for" and not (folder / "save").exists()
    kept = generation(folder, 1) / "kept.json"
    assert (files.read_json(kept)["name"] if kept.exists() else None) == name
    assert read_manifest(generation(folder, 2)).why == "periodic"


def test_a_folder_is_no_trigger_file(new_run: NewRun, tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "folder", 0)
    (folder / "save").mkdir()
    assert attempt(folder).stop == "NO"
    assert [read_manifest(generation(folder, step)).why for step in (1, 2)] == ["periodic"] * 2


# Stale weights


@pytest.mark.parametrize("size", [1, 2])
def test_weights_that_steps_have_not_changed_stop_the_run_and_are_not_saved(
    new_run: NewRun, tmp_path: Path, size: int
) -> None:
    folder = branch(short_run(new_run, size), tmp_path / "stale", 1)
    for ended in run_ranks(train, size, folder, [], breaking.optimizer_does_nothing):
        assert isinstance(ended.error, CheckpointError) and "bit for bit, those after step 1" in str(ended.error)
    assert steps_saved(folder) == ["prose/step_00000001"]


def no_learning(_job: Any) -> None:
    record.derive.learning_rate = lambda _phase, _step: 0.0


def test_weights_may_stay_as_they_are_while_the_learning_rate_is_zero(new_run: NewRun, tmp_path: Path) -> None:
    folder = branch(short_run(new_run), tmp_path / "still", 1)
    assert attempt(folder, no_learning).ended == (0, 4)
    weights = {read_manifest(generation(folder, step)).weights for step in (1, 2, 4)}
    assert len(weights) == 1


# What is left


def scales_after_a_step(rank: int, size: int, meeting: str, folder: Path) -> list[str]:
    """What saving says before and after a module has begun to keep scales, as Transformer Engine's do for `delayed`."""
    from crystal_hpc.train import sharding

    said = []
    model: Any = sharding.module(join(rank, size, meeting, folder))
    layer = model.decoder.layers[0].mlp.linear_fc1
    for kept in (0, 3):
        layer.__class__ = type("Engine", (type(layer),), {"get_extra_state": lambda _, kept=kept: torch.zeros(kept)})
        try:
            sharding.objects(model)
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_state_that_checkpoints_do_not_carry_is_not_left_out_quietly(new_run: NewRun) -> None:
    (said,) = values(run_ranks(scales_after_a_step, 1, new_run("run")))
    named = "decoder.layers.0.mlp.linear_fc1: keeps FP8 scales from step to step, which checkpoints do not carry"
    assert said == ["", named]


def test_exactly_what_the_rules_keep_is_left_after_interruptions(new_run: NewRun) -> None:
    short, _ = SHORT
    rules = short.replace("steps: 4", "steps: 9").replace("checkpoint_every: 1", "checkpoint_every: 2")
    folder = new_run("kept", rules, "checkpoints.keep_last=1", "checkpoints.asynchronous=false")
    left = []
    for steps in (3, 2, 1, 9):
        attempt(folder, breaking.stop_in_step, steps, "PREEMPTED")
        left.append([int(name[-2:]) for name in steps_saved(folder)])
    # Preemption saves after steps 3, 5 and 6; the newest periodic one and the newest verified one stay with them.
    assert left == [[2, 3], [3, 4, 5], [4, 5, 6], [6, 8, 9]]


def test_saves_on_preemption_do_not_pile_up(new_run: NewRun) -> None:
    short, _ = SHORT
    folder = new_run("preempted", short.replace("steps: 4", "steps: 9").replace("checkpoint_every: 1, ", ""))
    for step in range(1, 6):
        attempt(folder, breaking.stop_in_step, 1, "PREEMPTED")
        assert [int(name[-2:]) for name in steps_saved(folder)] == [before for before in (step - 1, step) if before]
