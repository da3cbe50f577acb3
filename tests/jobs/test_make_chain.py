"""A run as a chain of jobs: which there are, in which order, and what each waits for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc import files
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.jobs.chain import Kind, Link, done_links, is_trained, make_chain, staged_path

PHASES = ("prose", "code", "adaptation")
SIDE = {"time_limit": "10min"}
STEPS = 10

Chain = list[tuple[str, int, list[str]]]
"""Each link as `kind phase`, its slices, and what it waits for: `kind of dependency: number of a link`."""


def make_run(held_out: bool = True) -> Run:
    shape = {"sequence_length": 16, "batch_size": 8, "steps": STEPS, "learning_rate": {"peak": 0.1}}
    held = {"prose": "held-out"} if held_out else {}
    return Run.model_validate(
        {
            "name": "tiny",
            "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 536},
            "data": {"tokenizer": "t", "sources": {"prose": "p"}, "held_out": held},
            "phases": [{"name": name, "mixture": {"prose": 1.0}, **shape} for name in PHASES],
        }
    )


def make_cluster(**slurm: Any) -> Cluster:
    needed = {"name": "there", "executor": "slurm", "ranks_per_node": 1, "time_limit": "1h"}
    return Cluster.model_validate({**needed, "slurm": slurm})


def chain(*done: tuple[Kind, str], most: int = 1000, **slurm: Any) -> Chain:
    links = make_chain(make_run(), make_cluster(**slurm), done, most)
    for index, link in enumerate(links):
        assert all(before < index for _, before in link.after), "Slurm must know a job before another can wait for it"
    return [(f"{one.kind} {one.phase}", one.slices, [f"{how}:{index}" for how, index in one.after]) for one in links]


def test_by_default_a_phase_is_one_job_that_waits_for_the_one_before_it_to_succeed() -> None:
    assert chain() == [
        ("train prose", 1, []),
        ("train code", 1, ["afterok:0"]),
        ("train adaptation", 1, ["afterok:1"]),
    ]


def test_slices_are_an_array_and_the_next_phase_waits_for_its_end_whatever_that_was() -> None:
    assert chain(resume_by="slices", slices=7) == [
        ("train prose", 7, []),
        ("train code", 7, ["afterany:0"]),
        ("train adaptation", 7, ["afterany:1"]),
    ]


@pytest.mark.parametrize(
    ("slices", "most", "arrays"),
    [(6, 6, [6]), (7, 6, [6, 1]), (14, 6, [6, 6, 2]), (1, 6, [1]), (3, 1, [1, 1, 1]), (20, 1000, [20])],
)
def test_slices_that_are_too_many_for_one_array_become_several_one_after_the_other(
    slices: int, most: int, arrays: list[int]
) -> None:
    links = chain(resume_by="slices", slices=slices, most=most)
    assert [link[1] for link in links] == arrays * 3
    assert [link[2] for link in links] == [[], *([f"afterany:{index}"] for index in range(len(links) - 1))]


def test_staging_begins_at_once_one_phase_after_the_other_and_training_waits_for_both() -> None:
    assert chain(stage=SIDE) == [
        ("stage prose", 1, []),
        ("train prose", 1, ["afterok:0"]),
        ("stage code", 1, ["afterany:0"]),
        ("train code", 1, ["afterok:1", "afterok:2"]),
        ("stage adaptation", 1, ["afterany:2"]),
        ("train adaptation", 1, ["afterok:3", "afterok:4"]),
    ]


def test_nothing_waits_for_an_evaluation_but_it_waits_for_its_training() -> None:
    assert chain(evaluate=SIDE) == [
        ("train prose", 1, []),
        ("evaluate prose", 1, ["afterok:0"]),
        ("train code", 1, ["afterok:0"]),
        ("evaluate code", 1, ["afterok:2"]),
        ("train adaptation", 1, ["afterok:2"]),
        ("evaluate adaptation", 1, ["afterok:4"]),
    ]


def test_of_several_arrays_the_first_waits_for_the_stage_and_what_follows_for_the_last() -> None:
    assert chain(resume_by="slices", slices=3, most=2, stage=SIDE, evaluate=SIDE)[:7] == [
        ("stage prose", 1, []),
        ("train prose", 2, ["afterok:0"]),
        ("train prose", 1, ["afterany:1"]),
        ("evaluate prose", 1, ["afterany:2"]),
        ("stage code", 1, ["afterany:0"]),
        ("train code", 2, ["afterany:2", "afterok:4"]),
        ("train code", 1, ["afterany:5"]),
    ]


def test_phases_that_are_done_are_left_out_and_what_comes_first_waits_for_nothing() -> None:
    assert chain(("train", "prose")) == [("train code", 1, []), ("train adaptation", 1, ["afterok:0"])]
    assert chain(("train", "prose"), ("train", "code")) == [("train adaptation", 1, [])]
    assert chain(*(("train", name) for name in PHASES)) == []


def test_an_evaluation_that_is_left_of_a_trained_phase_waits_for_nothing() -> None:
    assert chain(("train", "prose"), ("evaluate", "code"), evaluate=SIDE) == [
        ("evaluate prose", 1, []),
        ("train code", 1, []),
        ("train adaptation", 1, ["afterok:1"]),
        ("evaluate adaptation", 1, ["afterok:2"]),
    ]


def test_a_phase_that_was_staged_is_not_staged_again() -> None:
    assert chain(("stage", "prose"), ("stage", "code"), stage=SIDE) == [
        ("train prose", 1, []),
        ("train code", 1, ["afterok:0"]),
        ("stage adaptation", 1, []),
        ("train adaptation", 1, ["afterok:1", "afterok:2"]),
    ]
    assert chain(("train", "prose"), stage=SIDE)[:2] == [("stage code", 1, []), ("train code", 1, ["afterok:0"])]


def test_what_is_done_but_not_asked_for_changes_nothing() -> None:
    everything = [("stage", "prose"), ("evaluate", "prose")]
    assert chain(*everything) == chain()  # type: ignore[arg-type]


def test_a_link_without_slices_or_dependencies_is_a_job_of_its_own() -> None:
    assert Link("train", "prose") == Link("train", "prose", slices=1, after=())


# --- What lies in the folder says what is done.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for phase in PHASES:
        (tmp_path / "checkpoints" / phase).mkdir(parents=True)
    for part in ("evals", "staged"):
        (tmp_path / part).mkdir()
    return tmp_path


def saved(folder: Path, phase: str, step: int = STEPS) -> None:
    generation = folder / "checkpoints" / phase / f"step_{step:08d}"
    generation.mkdir()
    files.write_json(generation / "manifest.json", {"seconds": 1.0})


def evaluated(folder: Path, phase: str) -> None:
    files.write_json(folder / "evals" / f"{phase}.json", {"losses": {}})


def staged(folder: Path, phase: str) -> None:
    files.write_json(staged_path(folder, phase), {})


Change = Callable[[Path, str], None]


@pytest.mark.parametrize(
    ("changes", "without_side_job", "with_side_job"),
    [
        ([], set(), set()),
        ([saved], set(), {"train"}),
        ([evaluated], {"evaluate"}, {"evaluate"}),
        ([saved, evaluated], {"train", "evaluate"}, {"train", "evaluate"}),
        ([staged], {"stage"}, {"stage"}),
        ([lambda folder, phase: saved(folder, phase, STEPS - 1)], set(), set()),
    ],
    ids=["nothing", "saved", "evaluated", "both", "staged", "not-at-the-end"],
)
def test_a_phase_is_done_with_its_last_checkpoint_and_unless_a_side_job_does_it_its_evaluation(
    folder: Path, changes: list[Change], without_side_job: set[Kind], with_side_job: set[Kind]
) -> None:
    for change in changes:
        change(folder, "code")
    for cluster, kinds in ((make_cluster(), without_side_job), (make_cluster(evaluate=SIDE), with_side_job)):
        assert done_links(folder, make_run(), cluster) == {(kind, "code") for kind in kinds}
        assert is_trained(folder, make_run(), cluster, "code") == ("train" in kinds)
        assert not is_trained(folder, make_run(), cluster)


def test_a_run_by_hand_or_on_this_machine_evaluates_as_it_trains(folder: Path) -> None:
    saved(folder, "prose")
    local = Cluster.model_validate({"name": "l", "executor": "local", "ranks_per_node": 1, "time_limit": "1h"})
    for cluster in (None, local):
        assert done_links(folder, make_run(), cluster) == set()
    evaluated(folder, "prose")
    for cluster in (None, local):
        assert done_links(folder, make_run(), cluster) == {("train", "prose"), ("evaluate", "prose")}


def test_without_held_out_documents_there_is_nothing_to_evaluate(folder: Path) -> None:
    saved(folder, "prose")
    evaluations = {("evaluate", phase) for phase in PHASES}
    assert done_links(folder, make_run(held_out=False), make_cluster()) == {("train", "prose"), *evaluations}
    cluster = make_cluster(evaluate=SIDE)
    links = make_chain(make_run(held_out=False), cluster, done_links(folder, make_run(held_out=False), cluster), 10)
    assert [(link.kind, link.phase, link.after) for link in links] == [
        ("train", "code", ()),
        ("train", "adaptation", (("afterok", 0),)),
    ]


def test_a_checkpoint_without_its_marker_is_none(folder: Path) -> None:
    saved(folder, "code")
    (folder / "checkpoints" / "code" / f"step_{STEPS:08d}" / "manifest.json").unlink()
    assert done_links(folder, make_run(), make_cluster(evaluate=SIDE)) == set()


def test_a_run_is_trained_when_every_phase_is(folder: Path) -> None:
    for phase in PHASES:
        assert not is_trained(folder, make_run(), make_cluster())
        saved(folder, phase)
        evaluated(folder, phase)
    assert is_trained(folder, make_run(), make_cluster())
    cluster = make_cluster(stage=SIDE, evaluate=SIDE)
    assert make_chain(make_run(), cluster, done_links(folder, make_run(), cluster), 10) == []
