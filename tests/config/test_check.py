"""Each rule that several keys must obey, broken once; the message names the key and what would be right."""

import copy
from typing import Any

import pytest

from crystal_hpc.config import check
from crystal_hpc.config.schema import Cluster, Run

PHASE: dict[str, Any] = {
    "name": "first",
    "sequence_length": 16,
    "batch_size": 8,
    "steps": 10,
    "mixture": {"prose": 0.6, "code": 0.4},
    "learning_rate": {"peak": 0.1, "warmup_steps": 3},
}
RUN: dict[str, Any] = {
    "name": "r",
    "model": {"layers": 6, "hidden": 96, "heads": 12, "ffn": 84, "vocab_size": 128},
    "parallel": {"micro_batch": 2},
    "data": {"tokenizer": "t", "sources": {"prose": "p", "code": "c"}, "held_out": {"prose": "h"}},
    "phases": [PHASE],
}


def problems(**changes: Any) -> list[str]:
    """The problems of the run with some keys changed: `model={...}`, or `phase={...}` for its only phase."""
    content = copy.deepcopy(RUN)
    for key, value in changes.items():
        target = content["phases"][0] if key == "phase" else content[key]
        target.update(value)
    return list(check.run_problems(Run.model_validate(content)))


def test_a_good_run_has_no_problems() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"heads": 7}}, "model.heads: 7 does not divide model.hidden = 96"),
        (
            {"parallel": {"tensor": 9}},
            "parallel.tensor: 9 does not divide model.heads = 12; choose one of 1, 2, 3, 4, 6, 12",
        ),
        (
            {"parallel": {"pipeline": 4}},
            "parallel.pipeline: 4 does not divide model.layers = 6; choose one of 1, 2, 3, 6",
        ),
        ({"model": {"rotary_fraction": 0.125, "heads": 12}}, "model.rotary_fraction: 0.125 of a head of 8 is odd"),
        (
            {"data": {"held_out": {"p": "c"}}},
            "data.held_out: c is also a training source; held-out documents must not be trained on",
        ),
        ({"phase": {"steps": None}}, "phases.0.steps: give exactly one of steps and tokens"),
        ({"phase": {"tokens": 1000}}, "phases.0.steps: give exactly one of steps and tokens"),
        (
            {"phase": {"mixture": {"prose": 0.6, "cod": 0.4}}},
            "phases.0.mixture.cod: no such source; did you mean 'code'?",
        ),
        (
            {"phase": {"mixture": {"prose": 0.6, "html": 0.4}}},
            "phases.0.mixture.html: no such source; choose from code, prose",
        ),
        (
            {"phase": {"fim": {"cod": {"rate": 0.5}}}},
            "phases.0.fim.cod: no such source in the phase's mixture; did you mean 'code'?",
        ),
        ({"phase": {"mixture": {"prose": 0.6, "code": 0.3}}}, "phases.0.mixture: the weights sum to 0.9, not 1"),
        ({"phase": {"mixture": {"prose": 0.0}}}, "phases.0.mixture: the weights sum to 0, not 1"),
        (
            {"phase": {"mixture": {"prose": 1.0, "code": 1e-12}}},
            "phases.0.mixture.code: 1e-12 is less than 1e-09; leave the source out",
        ),
        ({"phase": {"batch_size": 7}}, "phases.0.batch_size: 7 is not a multiple of parallel.micro_batch = 2"),
        (
            {"phase": {"learning_rate": {"peak": 0.1, "end": 0.2}}},
            "phases.0.learning_rate.end: 0.2 is above the peak 0.1",
        ),
        (
            {"phase": {"learning_rate": {"peak": 0.1, "warmup_steps": 11}}},
            "phases.0.learning_rate.warmup_steps: 11 is more than the phase's 10",
        ),
        (
            {"phase": {"steps": None, "tokens": 1280, "learning_rate": {"peak": 0.1, "warmup_steps": 11}}},
            "phases.0.learning_rate.warmup_steps: 11 is more than the phase's 10",
        ),
    ],
)
def test_what_cannot_work_is_said_with_what_would(changes: dict[str, Any], expected: str) -> None:
    assert expected in problems(**changes)


def test_two_phases_of_one_name_are_refused() -> None:
    run = Run.model_validate(RUN | {"phases": [PHASE, PHASE, PHASE]})
    assert list(check.run_problems(run)) == ["phases: two phases are called 'first'; give each its own name"]


def test_rounded_weights_as_published_are_accepted() -> None:
    # Crystal's phase 1 (shared/facts/crystal.md, section 4), which sums to 0.999999.
    weights = [0.533458, 0.266501, 0.049626, 0.043251, 0.041312, 0.034171, 0.031680]
    names = [f"s{n}" for n in range(len(weights))]
    data = {"sources": dict.fromkeys(names, "folder"), "held_out": {}}
    assert problems(data=data, phase={"mixture": dict(zip(names, weights, strict=True))}) == []


def test_all_problems_are_found_at_once() -> None:
    found = problems(parallel={"tensor": 5, "pipeline": 4}, phase={"steps": None, "mixture": {"x": 0.5}})
    assert len(found) == 6


def cluster(**more: Any) -> Cluster:
    minimal = {"name": "c", "executor": "local", "ranks_per_node": 1, "time_limit": "1h"}
    return Cluster.model_validate(minimal | more)


def layout(ranks: int, **parallel: int) -> list[str]:
    run = Run.model_validate(RUN | {"parallel": {"micro_batch": 2} | parallel})
    return list(check.layout_problems(run, cluster(ranks_per_node=ranks)))


def test_a_layout_must_fit_the_clusters_ranks() -> None:
    assert layout(4, tensor=2, pipeline=2) == []
    assert layout(6, tensor=2, pipeline=2) == [
        "parallel: tensor x pipeline = 4 does not divide the 6 ranks of cluster 'c'"
    ]


def test_scales_that_no_checkpoint_carries_are_no_choice_for_a_job() -> None:
    fp8 = {"precision": "bf16", "fp8": {"recipe": "delayed"}, "parallel": {"micro_batch": 2}}
    (said,) = check.layout_problems(Run.model_validate(RUN | fp8), cluster())
    assert said.startswith("fp8.recipe: delayed keeps scales") and said.endswith("choose tensorwise or blockwise")


def test_an_evaluation_job_needs_as_many_ranks_as_the_model() -> None:
    run = Run.model_validate(RUN | {"parallel": {"micro_batch": 2, "tensor": 2}})
    slurm = {"evaluate": {"time_limit": "10min", "ranks": 3}}
    (said,) = check.layout_problems(run, cluster(executor="slurm", ranks_per_node=4, slurm=slurm))
    assert said.startswith("slurm.evaluate.ranks: 3 is not a multiple of parallel: tensor x pipeline = 2, the ranks")
    assert said.endswith("make it 4")


def test_the_batch_must_be_shared_evenly_by_the_data_parallel_ranks() -> None:
    assert layout(4) == []
    assert layout(8) == ["phases.0.batch_size: 8 is not a multiple of micro_batch x data-parallel ranks = 16"]


def test_a_cluster_profile_is_refused_for_what_cannot_work_on_any_run() -> None:
    def problems(**more: Any) -> list[str]:
        return list(check.cluster_problems(cluster(**more)))

    assert problems() == problems(executor="slurm", nodes=4) == []
    assert problems(time_limit="1min") == ["signal_delay: 90s leaves nothing of the time limit of 60s"]
    assert problems(nodes=2) == ["nodes: 2; the local executor has this machine alone: make it 1, or executor: slurm"]
    assert problems(gpu="h200") == []
    assert problems(gpu="h100-smx") == ["gpu: 'h100-smx' is not known; did you mean 'h100-sxm'?"]
    assert problems(slurm={"partition": "gpu"}) == ["slurm: is for executor: slurm; this profile says local"]
    assert problems(executor="slurm", slurm={"options": {"job_name": "x", "reservation": "night", "Bad key": 1}}) == [
        "slurm.options.job_name: crystal sets this one itself",
        "slurm.options: 'Bad key' is no long option of sbatch",
    ]
    assert "environment.A B: not a name of" in problems(environment={"A B": "1"})[0]
    container = {"runtime": "apptainer", "image": "x.sif", "mounts": ["/a,/b"]}
    assert problems(executor="slurm", slurm={"container": container, "scratch": "$(touch x)"}) == [
        "slurm.scratch: '$(touch x)': only $NAME and ${NAME} are replaced by their values",
        "slurm.container.mounts: '/a,/b': one folder an entry, no commas",
    ]
    assert problems(executor="slurm", slurm={"scratch": "/scratch/${USER}/$SLURM_JOB_ID"}) == []


def test_staging_must_say_where_the_disk_is() -> None:
    def problems(executor: str = "slurm", environment: Any = (), slurm: Any = (), **staging: Any) -> list[str]:
        more = {"executor": executor, "environment": dict(environment), "slurm": dict(slurm)}
        return list(check.cluster_problems(cluster(**more, staging={"mode": "whole", **staging})))

    assert problems() == [
        "staging.folder: $CRYSTAL_SCRATCH is set by slurm.scratch, which is missing; add it, or name a folder here"
    ]
    assert "environment.CRYSTAL_SCRATCH, which is missing" in problems("local")[0]
    assert problems(slurm={"scratch": "/scratch"}) == problems("local", {"CRYSTAL_SCRATCH": "/x"}) == []
    assert problems(folder="/local/$SLURMD_NODENAME/${USER}") == []
    assert problems(folder="scratch")[0].startswith("staging.folder: 'scratch' is not an absolute path")
    assert problems(folder="/x/$(touch x)") == [
        "staging.folder: '/x/$(touch x)': only $NAME and ${NAME} are replaced by their values"
    ]
