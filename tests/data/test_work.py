"""Sharing work by locks on files: everything done once, by whoever is there, also when somebody dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crystal_hpc.data.work import claimed, default_workers, place_among_tasks, share
from crystal_hpc.errors import DiskError

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "5"}, (2, 5)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, (1, 3)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, (0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "2"}, (2, 5)),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3",
          "SLURM_ARRAY_TASK_STEP": "2"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0",
          "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, (6, 8)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_ARRAY_TASK_MIN": "0",
          "PMI_RANK": "1", "PMI_SIZE": "2"}, (7, 32)),
        ({"SLURM_ARRAY_TASK_ID": "90", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}, (1, 2)),  # 1,90
    ],
)  # fmt: skip
def test_a_process_finds_its_place_among_others_in_the_launchers_variables(
    variables: dict[str, str], place: tuple[int, int]
) -> None:
    assert place_among_tasks(variables) == place


def test_one_process_alone_uses_all_cores_and_one_of_many_only_its_own() -> None:
    assert default_workers((0, 1)) == len(os.sched_getaffinity(0))
    assert default_workers((3, 8)) == 1


def test_a_lock_has_one_holder_and_is_free_again_afterwards(tmp_path: Path) -> None:
    with claimed(tmp_path / "lock") as mine, claimed(tmp_path / "lock") as other:
        assert mine and not other
    with claimed(tmp_path / "lock") as mine:
        assert mine


def test_a_lock_in_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="a part of the path is a file"), claimed(tmp_path / "file" / "lock"):
        pass


@pytest.mark.parametrize(("rank", "order"), [(0, [0, 1, 2, 3, 4, 5]), (1, [2, 3, 4, 5, 0, 1]), (2, [4, 5, 0, 1, 2, 3])])
def test_processes_begin_at_different_places_and_each_does_all_if_need_be(
    tmp_path: Path, rank: int, order: list[int]
) -> None:
    done: list[int] = []
    share(range(6), str, done.__contains__, done.append, tmp_path, lambda: None, rank, 3)
    assert done == order


def test_what_a_dead_process_held_is_taken_over(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from crystal_hpc.data.work import claimed\n"
        "with claimed(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "1.lock")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        done: list[int] = []
        looks = 0

        def kill_it_after_the_third_look() -> None:
            nonlocal looks
            looks += 1
            if looks == 4:
                assert done == [0]
                holder.send_signal(signal.SIGKILL)
                holder.wait()

        share(range(2), str, done.__contains__, done.append, tmp_path, kill_it_after_the_third_look)
    assert done == [0, 1]
