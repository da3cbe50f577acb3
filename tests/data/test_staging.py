"""Staged stores: the same bytes, read once, whatever was there before, and whatever is wrong with disk or source."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crystal_hpc.comm import SoloComm
from crystal_hpc.data import scratch as disk
from crystal_hpc.data.catalog import STORE_FILE, StoreInfo, digest_of, read_store_info
from crystal_hpc.data.copying import PIECE
from crystal_hpc.data.shard import Documents, write_shard
from crystal_hpc.data.staging import StagedStore, copy_folder, stage_stores
from crystal_hpc.data.store import TokenStore
from crystal_hpc.errors import DiskError, StoreError
from crystal_hpc.files import PENDING, write_json

ROOT = Path(__file__).parents[2]
WORKER = """
import json, os, sys
from pathlib import Path
from crystal_hpc.comm import my_comm
from crystal_hpc.data import copying
from crystal_hpc.data.catalog import read_store_info
from crystal_hpc.data.staging import stage_stores
from crystal_hpc.errors import CrystalError
counted, preadv = [], os.preadv
def count(descriptor, buffers, start):
    size = preadv(descriptor, buffers, start)
    if os.readlink(f"/proc/self/fd/{descriptor}").startswith(sys.argv[1]):
        counted.append(size)
    return size
os.preadv = count
comm = my_comm()
try:
    staged = stage_stores([read_store_info(Path(sys.argv[1]))], Path(sys.argv[2].format(rank=comm.rank)), comm)
    answer = {"read": sum(counted), "copied": staged.copied, "kept": staged.kept, "size": comm.size}
except CrystalError as error:
    answer = {"error": f"{type(error).__name__}: {error}"}
Path(sys.argv[3], f"{comm.rank}.json").write_text(json.dumps(answer))
"""


def make_store(folder: Path, seed: int, shards: int = 2, tokens: int = 5_000_000) -> StoreInfo:
    """A store of random tokens: of several pieces a shard, the last one short."""
    folder.mkdir()
    chance = np.random.default_rng(seed)
    made = []
    for number in range(shards):
        ids = chance.integers(0, 500, tokens + number).astype("<u2")
        ends = np.array([0, len(ids)], np.int64)
        hashes = chance.integers(0, 2**63, (1, 2)).astype(np.uint64)
        documents = Documents(ends, hashes, np.zeros_like(hashes), np.array([0, 2]), np.frombuffer(b"{}", np.uint8))
        made.append(write_shard(folder / f"shard-{number:05d}.h5", documents, ids, {"tokenizer": "t"}))
    info = StoreInfo(
        folder, folder.name, "t", 500, 499, "uint16", shards, sum(s.tokens for s in made), seed, 1, 2, {}, tuple(made),
        digest_of(shard.digest for shard in made),
    )  # fmt: skip
    write_json(folder / STORE_FILE, info.as_json())
    return read_store_info(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoreInfo:
    return make_store(tmp_path_factory.mktemp("shared") / "store", 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> StoreInfo:
    return make_store(tmp_path_factory.mktemp("shared") / "other", 2, shards=1, tokens=100_000)


@pytest.fixture
def own(store: StoreInfo, tmp_path: Path) -> StoreInfo:
    """A store that the test may damage."""
    subprocess.run(["cp", "-r", store.folder, tmp_path / "own"], check=True)
    return read_store_info(tmp_path / "own")


def total(info: StoreInfo) -> int:
    return sum(shard.bytes for shard in info.shards)


def same(info: StoreInfo, scratch: Path) -> bool:
    copy = copy_folder(info, scratch)
    names = {path.name for path in copy.iterdir()}
    assert names == {*(shard.name for shard in info.shards), STORE_FILE, disk.LOCK}
    return all((copy / s.name).read_bytes() == (info.folder / s.name).read_bytes() for s in info.shards)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_copy_has_the_same_bytes_and_is_found_again(store: StoreInfo, other: StoreInfo, tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    staged = stage_stores([store, other, store], tmp_path, SoloComm(), on_progress=lambda _, *n: shown.append(n))
    assert (staged.read, staged.copied, staged.kept) == (total(store) + total(other), total(store) + total(other), 0)
    assert same(store, tmp_path) and same(other, tmp_path)
    assert shown == sorted(shown) and shown[-1][0] <= shown[-1][1] == total(store) + total(other)
    again = stage_stores([store, other], tmp_path, SoloComm())
    assert (again.read, again.copied, again.kept) == (0, 0, total(store) + total(other))
    copy = StagedStore.find(TokenStore(store), tmp_path)
    assert copy is not None and copy.info.folder == copy_folder(store, tmp_path)
    TokenStore(copy.info).check_digests()
    assert np.array_equal(copy.row(300, 2048), TokenStore(store).row(300, 2048))


def test_of_half_a_copy_what_is_good_is_kept(store: StoreInfo, tmp_path: Path) -> None:
    stage_stores([store], tmp_path, SoloComm())
    copy, first, second = copy_folder(store, tmp_path), *store.shards
    (copy / STORE_FILE).unlink()
    os.rename(copy / second.name, copy / (second.name + PENDING))
    flip(copy / first.name, first.tokens_at + PIECE + 5)  # of a finished one, too
    flip(copy / (second.name + PENDING), second.tokens_at + second.tokens)
    staged = stage_stores([store], tmp_path, SoloComm())
    assert (staged.read, staged.copied) == (2 * PIECE, 2 * PIECE), "the two pieces with a flipped bit"
    assert same(store, tmp_path)


def test_a_pending_file_that_is_another_is_made_anew(store: StoreInfo, tmp_path: Path) -> None:
    copy = copy_folder(store, tmp_path)
    copy.mkdir(parents=True)
    (copy / (store.shards[0].name + PENDING)).write_bytes(b"x" * (store.shards[0].bytes + 4096))
    stage_stores([store], tmp_path, SoloComm())
    assert same(store, tmp_path)


@pytest.mark.parametrize("moments", [1, 3, 5])
def test_a_copy_killed_in_the_middle_goes_on(store: StoreInfo, tmp_path: Path, moments: int) -> None:
    # Killed by itself after so many pieces are on the disk: no clock decides where.
    program = f"""
import os, signal
from crystal_hpc.data import copying, staging
real, left = copying.write_at, [{moments}]
def write_at(*words):
    real(*words)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
staging.write_at = write_at
"""
    words = [sys.executable, "-c", program + WORKER, str(store.folder), str(tmp_path), str(tmp_path)]
    killed = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (copy_folder(store, tmp_path) / STORE_FILE).exists()
    assert StagedStore.find(TokenStore(store), tmp_path) is None
    staged = stage_stores([store], tmp_path, SoloComm())
    assert staged.kept > 0 or moments == 1
    assert same(store, tmp_path)


def test_told_to_stop_it_leaves_half_a_copy_for_the_next_time(store: StoreInfo, tmp_path: Path) -> None:
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 6

    stopped = stage_stores([store], tmp_path, SoloComm(), should_stop)
    assert stopped.stopped and not (copy_folder(store, tmp_path) / STORE_FILE).exists()
    staged = stage_stores([store], tmp_path, SoloComm())
    assert not staged.stopped and 0 < staged.kept < total(store)
    assert same(store, tmp_path)


@pytest.mark.parametrize("where", ["tokens", "documents"])
def test_damage_at_the_source_is_named(own: StoreInfo, tmp_path: Path, where: str) -> None:
    second = own.shards[1]
    flip(own.folder / second.name, second.tokens_at + 3 * (1 << 16) if where == "tokens" else 2 * 4096)
    said = r"shard-00001.h5: block 3 of 153 of the tokens" if where == "tokens" else r"shard-00001.h5: damaged around"
    with pytest.raises(StoreError, match=said):
        stage_stores([own], tmp_path, SoloComm())
    assert not (copy_folder(own, tmp_path) / STORE_FILE).exists()


def test_a_bad_piece_is_fetched_again(own: StoreInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The source reads wrong once and right afterwards, as over a network with a flipped bit.
    real, wrong = os.preadv, []

    def preadv(descriptor: int, buffers: Any, start: int) -> int:
        count = real(descriptor, buffers, start)
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(own.folder)) and start > PIECE and not wrong:
            buffers[0][7] ^= 1
            wrong.append(start)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    staged = stage_stores([own], tmp_path, SoloComm())
    assert wrong and staged.read == total(own) + PIECE
    assert same(own, tmp_path)


def test_a_source_that_is_cut_short_or_gone_is_named(own: StoreInfo, tmp_path: Path) -> None:
    os.truncate(own.folder / own.shards[1].name, own.shards[1].tokens_at + 1000)
    with pytest.raises(StoreError, match=r"shard-00001.h5: ends at byte"):
        stage_stores([own], tmp_path, SoloComm())
    (own.folder / own.shards[1].name).unlink()
    with pytest.raises(StoreError, match=r"shard-00001.h5: cannot be read \(No such file"):
        stage_stores([own], tmp_path, SoloComm())


def test_too_little_space_is_said_before_anything_is_copied(store: StoreInfo, small_disk: Path) -> None:
    with pytest.raises(DiskError, match=r"small on .*: [\d,]+ bytes are needed for the stores, [\d,]+ are free"):
        stage_stores([store], small_disk, SoloComm())
    assert not list(small_disk.rglob(f"*{PENDING}"))


def test_a_disk_that_refuses_in_the_middle_is_one_line(store: StoreInfo, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(DiskError, match="larger than this file system or user may write"):
            stage_stores([store], tmp_path, SoloComm())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    stage_stores([store], tmp_path, SoloComm())
    assert same(store, tmp_path)


def test_what_dead_jobs_left_is_removed_and_what_is_in_use_is_not(
    store: StoreInfo, other: StoreInfo, tmp_path: Path
) -> None:
    stores = disk.stores_folder(tmp_path)
    dead, busy = stores / "dead", stores / "busy"
    slices = disk.slices_folder(tmp_path) / "gone"
    for folder in (dead, busy, slices):
        folder.mkdir(parents=True)
        (folder / f"shard-00000.h5{PENDING}").write_bytes(b"half")
    stage_stores([store], tmp_path, SoloComm())
    assert not dead.exists() and not busy.exists() and not slices.exists()
    busy.mkdir()
    held = disk.lock(busy, exclusive=True)
    assert held is not None
    stage_stores([other], tmp_path, SoloComm())
    assert busy.exists() and same(store, tmp_path), "a whole copy stays as long as there is room"


def test_room_is_made_from_whole_copies_the_oldest_first_but_not_from_one_in_use(
    store: StoreInfo, other: StoreInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_stores([store, other], tmp_path, SoloComm())
    marker = copy_folder(other, tmp_path) / STORE_FILE
    os.utime(marker, (1, 1))
    using = StagedStore.find(TokenStore(other), tmp_path)
    assert using is not None
    disk.make_room(tmp_path, 1 << 60, [])
    assert marker.exists() and not copy_folder(store, tmp_path).exists()
    using._held.release()
    disk.make_room(tmp_path, 1 << 60, [])
    assert not marker.exists()


def test_a_copy_that_another_process_is_making_is_left_to_it(store: StoreInfo, tmp_path: Path) -> None:
    copy_folder(store, tmp_path).mkdir(parents=True)
    held = disk.lock(copy_folder(store, tmp_path), exclusive=True)
    assert held is not None
    with pytest.raises(DiskError, match="another process is copying this store"):
        stage_stores([store], tmp_path, SoloComm())


def test_a_copy_that_is_damaged_later_is_a_warning_and_the_original_is_read(
    store: StoreInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_stores([store], tmp_path, SoloComm())
    flip(copy_folder(store, tmp_path) / store.shards[0].name, store.shards[0].tokens_at + 100)
    copy = StagedStore.find(TokenStore(store), tmp_path)
    assert copy is not None
    monkeypatch.setattr("crystal_hpc.data.staging.log.propagate", True)
    for number in (0, 1, 500):
        assert np.array_equal(copy.row(number, 64), TokenStore(store).row(number, 64))
    assert [record.message.partition(":")[0] for record in caplog.records] == ["the copy on this node fails"]


def test_a_folder_is_found_on_each_node_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE", "n7")
    assert disk.scratch_folder("/local/${NODE}/x") == Path("/local/n7/x")
    with pytest.raises(DiskError, match="CRYSTAL_NO is not set here"):
        disk.scratch_folder("$CRYSTAL_NO/x")
    with pytest.raises(DiskError, match="not an absolute path"):
        disk.scratch_folder("x")


# --- Several ranks, each a node.


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Stages under mpiexec: ranks(store, folder with {rank} in it, size, program before the worker's)."""
    pytest.importorskip("mpi4py")
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python; install the extra [mpi]")

    def run(info: StoreInfo, folder: str, size: int, before: str = "") -> list[dict[str, Any]]:
        program = [sys.executable, "-c", before + WORKER, str(info.folder), folder, str(tmp_path)]
        words = [str(mpiexec), "-n", str(size), *program]
        subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]

    yield run


@pytest.mark.parametrize("size", [2, 3])
def test_several_nodes_read_the_source_once(ranks: Any, store: StoreInfo, tmp_path: Path, size: int) -> None:
    answers = ranks(store, f"{tmp_path}/n{{rank}}", size)
    assert sum(answer["read"] for answer in answers) == total(store)
    assert min(answer["read"] for answer in answers) > total(store) // 10, "each does its share"
    assert [answer["copied"] for answer in answers] == [total(store)] * size
    assert all(same(store, tmp_path / f"n{rank}") for rank in range(size))


def test_a_node_that_has_some_gets_only_the_rest(ranks: Any, store: StoreInfo, tmp_path: Path) -> None:
    stage_stores([store], tmp_path / "n0", SoloComm())
    stage_stores([store], tmp_path / "n1", SoloComm())
    copy, second = copy_folder(store, tmp_path / "n1"), store.shards[1]
    (copy / STORE_FILE).unlink()
    flip(copy / second.name, second.tokens_at + PIECE)
    answers = ranks(store, f"{tmp_path}/n{{rank}}", 2)
    assert [answer["copied"] for answer in answers] == [0, PIECE]
    assert sum(answer["read"] for answer in answers) == PIECE
    assert same(store, tmp_path / "n0") and same(store, tmp_path / "n1")


def test_a_disk_that_fills_up_on_one_node_ends_it_on_all(ranks: Any, store: StoreInfo, tmp_path: Path) -> None:
    before = """
import os
from crystal_hpc.data import copying, staging
real, left = copying.write_at, [3]
def write_at(descriptor, data, start, path):
    left[0] -= 1
    if left[0] == 0 and os.environ["PMI_RANK"] == "1":
        descriptor = os.open("/dev/full", os.O_RDWR)
    real(descriptor, data, start, path)
staging.write_at = write_at
"""
    answers = ranks(store, f"{tmp_path}/n{{rank}}", 2, before)
    assert answers[0] == answers[1]
    assert "DiskError" in answers[0]["error"] and "/n1/" in answers[0]["error"]
    assert "the disk is full" in answers[0]["error"]
    answers = ranks(store, f"{tmp_path}/n{{rank}}", 2)
    assert all(answer["kept"] > 0 for answer in answers), "half copies resume"
    assert same(store, tmp_path / "n0") and same(store, tmp_path / "n1")


def test_damage_at_the_source_is_named_on_all_nodes(ranks: Any, own: StoreInfo, tmp_path: Path) -> None:
    flip(own.folder / own.shards[0].name, own.shards[0].tokens_at + 5 * (1 << 16))
    answers = ranks(own, f"{tmp_path}/n{{rank}}", 2)
    assert answers[0] == answers[1]
    assert "shard-00000.h5: block 5 of 153 of the tokens is damaged" in answers[0]["error"]
