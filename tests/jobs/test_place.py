"""Where a rank stands, from the variables of each scheduler, as they were seen in real jobs."""

import pytest

from crystal_hpc.errors import RunError
from crystal_hpc.jobs.place import Place, job_of, my_place

# Of a task of srun on the second of two nodes with two ranks each (Slurm 22.05).
TASK = {
    "SLURM_JOB_ID": "17",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURMD_NODENAME": "n2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SUBMITIT_EXECUTOR": "slurm",
}
FIRST = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"}
ELEMENT = {"SLURM_JOB_ID": "28", "SLURM_ARRAY_JOB_ID": "26", "SLURM_ARRAY_TASK_ID": "3"}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "4711",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (LOCAL, Place("local", "4711", 0, 1, 2, 1, None, "127.0.0.1")),
        ({**TASK, **LOCAL}, Place("local", "4711", 0, 1, 2, 1, None, "127.0.0.1")),
        (TASK, Place("slurm", "17", 0, 3, 4, 1, "n2", "n2")),
        ({**TASK, **FIRST}, Place("slurm", "17", 0, 0, 4, 0, "n1", "10.0.0.1")),
        ({**TASK, "SLURM_RESTART_COUNT": "2"}, Place("slurm", "17", 2, 3, 4, 1, "n2", "n2")),
        ({**TASK, **ELEMENT}, Place("slurm", "26_3", 0, 3, 4, 1, "n2", "n2")),
        ({**TASK, **ELEMENT, "SLURM_RESTART_COUNT": "1"}, Place("slurm", "26_3", 1, 3, 4, 1, "n2", "n2")),
        # The allocation may be larger than the step; the step's ranks are the ones that meet.
        ({**TASK, "SLURM_NTASKS": "8"}, Place("slurm", "17", 0, 3, 4, 1, "n2", "n2")),
        ({**TASK, "SLURM_STEP_NUM_TASKS": ""}, Place("slurm", "17", 0, 3, 4, 1, "n2", "n2")),
    ],
    ids=[
        "local", "local-inside-an-allocation", "slurm", "first-node", "requeued", "slice", "requeued-slice",
        "step-smaller-than-its-job", "no-number-of-the-step",
    ],
)  # fmt: skip
def test_a_rank_finds_its_place_in_the_variables_of_its_scheduler(environ: dict[str, str], place: Place) -> None:
    assert my_place(environ) == place


def test_the_first_rank_goes_by_its_nodes_name_where_slurm_gives_no_address() -> None:
    without = {name: value for name, value in {**TASK, **FIRST}.items() if name != "SLURM_LAUNCH_NODE_IPADDR"}
    assert my_place(without).address == "n1"


def test_how_often_a_local_job_was_requeued_is_submitits_to_count_and_of_a_slurm_job_slurms() -> None:
    assert my_place(LOCAL, launch=3).launch == 3
    assert my_place({**TASK, "SLURM_RESTART_COUNT": "1"}, launch=3).launch == 1


def test_a_start_of_a_job_has_a_name_of_its_own() -> None:
    assert my_place(LOCAL, launch=1).start == "4711.1"
    assert my_place({**TASK, **ELEMENT, "SLURM_RESTART_COUNT": "2"}).start == "26_3.2"


@pytest.mark.parametrize("environ", [{}, {"SUBMITIT_EXECUTOR": "slurm"}, {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4"}])
def test_a_process_outside_of_any_job_is_refused_with_the_command_that_starts_one(environ: dict[str, str]) -> None:
    with pytest.raises(RunError, match="this process is no rank of a job; start runs with: crystal submit"):
        my_place(environ)


def test_without_a_mapping_the_process_looks_at_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    assert my_place().rank == 3


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({"SLURM_JOB_ID": "17"}, ("17", 0)),
        ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "4"}, ("17", 4)),
        (ELEMENT, ("26_3", 0)),
        # The last element to start has the id of the array.
        ({**ELEMENT, "SLURM_JOB_ID": "26"}, ("26_3", 0)),
        ({**ELEMENT, "SLURM_ARRAY_TASK_ID": "0"}, ("26_0", 0)),
    ],
)
def test_the_job_of_a_batch_script_is_named_as_people_write_it(environ: dict[str, str], job: tuple[str, int]) -> None:
    assert job_of(environ) == job
