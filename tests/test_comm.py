"""Ranks agree: alone, as two real processes that talk over gloo, and as one to three under mpiexec."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.comm import BytesComm, Comm, MpiComm, SoloComm, TorchComm, launched_by_mpi, my_comm

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


@pytest.fixture(scope="module")
def mpiexec() -> str:
    """The program of the mpich wheel, beside this Python, or that of the system."""
    pytest.importorskip("mpi4py")
    beside = Path(sys.prefix) / "bin" / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    return found or pytest.skip("mpiexec is not installed")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_of_mpiexec_agree_like_all_others(mpiexec: str, size: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [mpiexec, "-n", str(size), sys.executable, __file__, "mpi", str(tmp_path)]
    subprocess.run(words, env=environment, check=True, timeout=60)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    assert [(answer["rank"], answer["size"]) for answer in answers] == [(rank, size) for rank in range(size)]
    assert [answer["broadcast"] for answer in answers] == [[0, None, {"from": [0]}]] * size
    assert [answer["gather"] for answer in answers] == [[{"rank": rank} for rank in range(size)]] * size
    assert [answer["any_true"] for answer in answers] == [[False, True, True, size > 1]] * size
    expected = [size, sum(range(size)), size * BIG % WRAP, WRAP - size, 0, WRAP - size, 3 * size]
    assert [answer["sum"] for answer in answers] == [expected] * size
    assert [answer["sum of nothing"] for answer in answers] == [[]] * size
    assert [answer["sum_float"] for answer in answers] == [sum(0.1 + rank for rank in range(size))] * size
    assert [answer["shared"] for answer in answers] == [[f"from {rank}" for rank in range(size)]] * size


def test_a_rank_of_mpi_that_fails_takes_the_others_along(mpiexec: str) -> None:
    program = "from crystal_hpc.comm import my_comm; comm = my_comm(); 1 / comm.rank; comm.barrier()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [mpiexec, "-n", "2", sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr


def test_mpi_is_left_alone_where_nobody_started_it() -> None:
    assert not launched_by_mpi({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}), "srun without --mpi"
    assert isinstance(my_comm(), SoloComm)
    assert "mpi4py.MPI" not in sys.modules, "importing it would start it"


def shares(comm: BytesComm) -> list[str]:
    """What every rank in turn gives to all."""
    heard = []
    for root in range(comm.size):
        buffer = bytearray(f"from {comm.rank}".encode())
        comm.share(memoryview(buffer), root)
        heard.append(buffer.decode())
    return heard


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


if __name__ == "__main__" and sys.argv[1] == "mpi":
    world = MpiComm()
    answer = {**check_all(world), "shared": shares(world)}
    (Path(sys.argv[2]) / f"{world.rank}.json").write_text(json.dumps(answer))
elif __name__ == "__main__":
    print(json.dumps(work(int(sys.argv[1]), Path(sys.argv[2]))))
