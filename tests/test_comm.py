"""Ranks agree: alone, and as two real processes that talk over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.comm import Comm, SoloComm, TorchComm

BIG = 2**63 + 12345
WRAP = 2**64


def check_all(comm: Comm) -> dict[str, Any]:
    """Everything a Comm can do, from one rank."""
    rank = comm.rank
    comm.barrier()
    return {
        "rank": rank,
        "size": comm.size,
        "broadcast": [comm.broadcast(value) for value in (rank, None, {"from": [rank]})],
        "gather": comm.gather({"rank": rank}),
        "any_true": [comm.any_true(flag) for flag in (False, True, rank == 0, rank == 1)],
        "sum": comm.sum([1, rank, BIG, WRAP - 1, 0, -1, WRAP + 3]),
        "sum of nothing": comm.sum([]),
        "sum_float": comm.sum_float(0.1 + rank),
    }


def test_one_process_agrees_with_itself() -> None:
    assert check_all(SoloComm()) == {
        "rank": 0,
        "size": 1,
        "broadcast": [0, None, {"from": [0]}],
        "gather": [{"rank": 0}],
        "any_true": [False, True, True, False],
        "sum": [1, 0, BIG, WRAP - 1, 0, WRAP - 1, 3],
        "sum of nothing": [],
        "sum_float": 0.1,
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found; one start serves all the tests."""
    folder = tmp_path_factory.mktemp("comm")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_each_rank_knows_its_place(answers: list[dict[str, Any]]) -> None:
    assert [(answer["rank"], answer["size"]) for answer in answers] == [(0, 2), (1, 2)]


def test_every_rank_gets_rank_zeros_value(answers: list[dict[str, Any]]) -> None:
    assert [answer["broadcast"] for answer in answers] == [[0, None, {"from": [0]}]] * 2


def test_every_rank_gets_all_values_in_order(answers: list[dict[str, Any]]) -> None:
    assert [answer["gather"] for answer in answers] == [[{"rank": 0}, {"rank": 1}]] * 2


def test_a_flag_of_one_rank_is_seen_by_all(answers: list[dict[str, Any]]) -> None:
    assert [answer["any_true"] for answer in answers] == [[False, True, True, True]] * 2


def test_sums_wrap_around_at_two_to_the_64(answers: list[dict[str, Any]]) -> None:
    expected = [2, 1, 2 * BIG - WRAP, WRAP - 2, 0, WRAP - 2, 6]
    assert [answer["sum"] for answer in answers] == [expected] * 2
    assert [answer["sum of nothing"] for answer in answers] == [[]] * 2


def test_sums_of_fractions_are_the_same_on_every_rank(answers: list[dict[str, Any]]) -> None:
    assert [answer["sum_float"] for answer in answers] == [0.1 + 1.1] * 2


def test_a_rank_that_waits_is_released_only_by_the_last(answers: list[dict[str, Any]]) -> None:
    # Rank 1 came to the barrier half a second late, and rank 0 must have waited for it.
    assert answers[0]["waited"] >= 0.4


def work(rank: int, folder: Path) -> dict[str, Any]:
    """One rank's part of the tests above."""
    import time

    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm = TorchComm()
    answer = check_all(comm)
    comm.barrier()
    begun = time.monotonic()
    time.sleep(0.5 * rank)
    comm.barrier()
    answer["waited"] = time.monotonic() - begun
    dist.destroy_process_group()
    return answer


if __name__ == "__main__":
    print(json.dumps(work(int(sys.argv[1]), Path(sys.argv[2]))))
