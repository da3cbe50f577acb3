"""Reading a store: many shards are one stream, and damage is told, not trained on."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc.data import store as module
from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.catalog import ShardInfo, StoreInfo, digest_of
from crystal_hpc.data.shard import BLOCK, Documents, read_shard_info, shuffle_keys, write_shard
from crystal_hpc.data.store import TokenStore
from crystal_hpc.errors import StoreError


@pytest.fixture
def info(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> StoreInfo:
    """A store of six shards."""
    built = build_store([corpus], tmp_path / "store", tokenizer_folder, Options(shard_tokens=3900))
    assert built is not None and len(built.shards) == 6
    return built


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> TokenStore:
    """A store with a shard for almost every document."""
    built = build_store([corpus], tmp_path_factory.mktemp("many"), tokenizer_folder, Options(shard_tokens=150))
    assert built is not None and len(built.shards) > 80
    return TokenStore.open(built.folder)


@pytest.fixture(scope="module")
def stream(many: TokenStore) -> npt.NDArray[Any]:
    """All its tokens, read through h5py."""
    pieces = []
    for shard in many.info.shards:
        with h5py.File(many.info.folder / shard.name) as file:
            pieces.append(file["tokens"][:])
    return np.concatenate(pieces)


@given(data=st.data())
@settings(max_examples=200, deadline=None, database=None)
def test_any_window_is_that_of_the_concatenation(many: TokenStore, stream: npt.NDArray[Any], data: Any) -> None:
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    window = many.read(start, count)
    assert window.dtype == np.uint16 and np.array_equal(window, stream[start : start + count])


@pytest.mark.parametrize("length", [1, 16, 333, 4096])
def test_rows_overlap_by_one_token(many: TokenStore, stream: npt.NDArray[Any], length: int) -> None:
    assert many.rows(length) == (len(stream) - 1) // length
    for number in range(many.rows(length)):
        row = many.row(number, length)
        assert row.shape == (length + 1,)
        assert np.array_equal(row, stream[number * length : number * length + length + 1])


def test_documents_are_bounded_by_their_ends(many: TokenStore) -> None:
    for number in range(many.info.documents):
        document = many.document(number)
        assert document[0] == 1 and document[-1] == 2
        assert not np.isin(document[1:-1], [0, 1, 2]).any()


def test_what_is_out_of_range_is_an_index_error(many: TokenStore) -> None:
    with pytest.raises(IndexError, match="tokens"):
        many.read(many.tokens - 1, 2)
    with pytest.raises(IndexError, match="tokens"):
        many.read(-1, 1)
    with pytest.raises(IndexError, match="row"):
        many.row(many.rows(16), 16)
    with pytest.raises(IndexError, match="document 120 of 120"):
        many.document(120)


def test_opening_opens_no_shard_and_reading_asks_hdf5_nothing(info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("HDF5 was asked")

    monkeypatch.setattr(h5py, "File", refuse)
    store = TokenStore.open(info.folder)
    assert not store._maps
    store.read(0, info.shards[0].tokens)
    assert list(store._maps) == [0]


def test_only_so_many_files_are_held_open(
    many: TokenStore, stream: npt.NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_MAPPED", 4)
    store = TokenStore(many.info)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    kept = store.read(0, 5)
    assert np.array_equal(store.read(0, store.tokens), stream)
    assert np.array_equal(kept, stream[:5])  # a window outlives its map
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 8


def test_a_store_travels_to_a_worker_without_its_maps(many: TokenStore) -> None:
    many.read(0, many.tokens)
    packed = pickle.dumps(many)
    assert len(packed) < 50_000
    assert np.array_equal(pickle.loads(packed).read(100, 50), many.read(100, 50))


def test_what_is_read_cannot_damage_the_store(many: TokenStore) -> None:
    with pytest.raises(ValueError, match="read-only"):
        many.read(0, 5)[0] = 7


def test_a_good_store_passes_the_check(info: StoreInfo) -> None:
    seen: list[tuple[str, int, int]] = []
    TokenStore(info).check_digests(lambda *said: seen.append(said))
    assert len(seen) == 6 and seen[-1] == ("checking", info.tokens, info.tokens)


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def offset_of(path: Path, dataset: str) -> int:
    with h5py.File(path) as file:
        return int(file[dataset].id.get_offset())


def test_a_flipped_bit_is_found_and_named_with_a_remedy_that_works(
    info: StoreInfo, corpus: Path, tokenizer_folder: Path
) -> None:
    path = info.folder / info.shards[3].name
    flip(path, offset_of(path, "tokens") + 1001)
    with pytest.raises(StoreError, match=r"shard-00003.h5: block 0 of 1 of the tokens is damaged; delete the file and"):
        TokenStore.open(info.folder).check_digests()
    path.unlink()
    build_store([corpus], info.folder, tokenizer_folder, Options(shard_tokens=3900))
    TokenStore.open(info.folder).check_digests()


@pytest.mark.parametrize("dataset", ["digests", "doc_offsets", "doc_hashes", "id_hashes", "info_offsets", "superblock"])
def test_damage_beside_the_tokens_is_found_too(info: StoreInfo, dataset: str) -> None:
    path = info.folder / info.shards[2].name
    flip(path, 20 if dataset == "superblock" else offset_of(path, dataset) + 3)
    with pytest.raises(
        StoreError, match=r"shard-00002.h5: damaged around its tokens, or not the shard that store.json"
    ):
        TokenStore.open(info.folder).check_digests()


def test_every_single_byte_of_a_shard_is_covered(info: StoreInfo) -> None:
    path, shard = info.folder / info.shards[0].name, info.shards[0]
    for position in [*range(0, shard.bytes, 997), shard.bytes - 1]:
        flip(path, position)
        with pytest.raises(StoreError, match=r"shard-00000.h5: (damaged around|block 0 of)"):
            TokenStore(info).check_digests()
        flip(path, position)
    TokenStore(info).check_digests()


@pytest.fixture
def large(tmp_path: Path) -> TokenStore:
    """One shard of three blocks, the last of them half full."""
    path = tmp_path / "shard-00000.h5"
    shard = write_one(path, np.arange(5 * BLOCK // 4) % 65536)
    assert shard == read_shard_info(path)
    assert (shard.documents, shard.max_token) == (1, 65535) and shard.tokens_at % 4096 == 0
    return TokenStore(store_of(tmp_path, shard))


def write_one(path: Path, tokens: npt.NDArray[Any], dtype: str = "<u2") -> ShardInfo:
    """A shard of one document."""
    none, one = np.zeros((1, 2), np.uint64), np.zeros(2, np.int64)
    documents = Documents(np.array([0, len(tokens)]), none, none, one, np.zeros(0, np.uint8))
    return write_shard(path, documents, tokens.astype(dtype), {})


def test_a_damaged_block_is_found_when_it_is_first_read_and_only_then(large: TokenStore) -> None:
    flip(large.path(0), large.info.shards[0].tokens_at + 2 * BLOCK + 5)
    assert large.read(0, BLOCK).tolist() == list(range(BLOCK))  # the first two blocks are good
    with pytest.raises(StoreError, match="block 2 of 3 of the tokens is damaged; delete the file and"):
        large.read(BLOCK - 1, 2)
    with pytest.raises(StoreError, match="block 2 of 3"):
        large.check_digests()


def test_without_checks_a_damaged_block_is_read_as_it_is(large: TokenStore) -> None:
    flip(large.path(0), large.info.shards[0].tokens_at)
    assert TokenStore(large.info, check=False).read(0, 2).tolist() == [1, 1]


def test_each_block_is_looked_at_once(large: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = xxhash.xxh3_128_digest
    monkeypatch.setattr(module.xxhash, "xxh3_128_digest", lambda data: looked.append(len(data)) or real(data))
    for start in (10, 5, 0, BLOCK // 2 - 1, 10):
        large.read(start, 2)
    assert looked == [BLOCK, BLOCK]


def store_of(folder: Path, shard: ShardInfo) -> StoreInfo:
    """The description of a store of one shard."""
    return StoreInfo(
        folder=folder,
        name="one",
        tokenizer="0" * 16,
        vocab_size=65536,
        max_token=shard.max_token,
        dtype="uint16",
        documents=shard.documents,
        tokens=shard.tokens,
        seed=1,
        bos=None,
        eos=None,
        rejected={},
        shards=(shard,),
        digest=digest_of([shard.digest]),
    )


@pytest.mark.parametrize("content", [bytes, lambda size: b"not HDF5 at all".ljust(size)])
def test_a_shard_that_is_something_else_is_a_store_error(info: StoreInfo, content: Any) -> None:
    path = info.folder / info.shards[0].name
    path.write_bytes(content(path.stat().st_size))
    store = TokenStore.open(info.folder)
    for use in (lambda: store.read(0, 5), lambda: store.document(0), store.check_digests):
        with pytest.raises(StoreError, match="damaged") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_shard_that_vanishes_or_shrinks_after_opening_is_a_store_error(info: StoreInfo) -> None:
    store = TokenStore.open(info.folder)
    os.truncate(info.folder / info.shards[0].name, 5000)
    with pytest.raises(StoreError, match="damaged"):
        store.read(0, 5)
    (info.folder / info.shards[0].name).unlink()
    with pytest.raises(StoreError, match="the shard is missing"):
        store.read(0, 5)


def test_a_shard_of_another_type_is_refused(info: StoreInfo) -> None:
    write_one(info.folder / info.shards[0].name, np.zeros(10), "<u4")
    with pytest.raises(StoreError, match="damaged"):
        TokenStore(info).read(0, 5)


def test_a_disk_that_fills_up_under_a_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    program = (
        "import resource, sys\nimport numpy as np\nfrom pathlib import Path\nfrom crystal_hpc.errors import DiskError\n"
        "from crystal_hpc.data.shard import Documents, write_shard\n"
        "none, one = np.zeros((1, 2), np.uint64), np.zeros(2, np.int64)\n"
        "documents = Documents(np.array([0, 10**6]), none, none, one, np.zeros(0, np.uint8))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try:\n    write_shard(Path(sys.argv[1]), documents, np.zeros(10**6, '<u2'), {})\n"
        "except DiskError as error:\n    sys.exit(f'told: {error}')\n"
    )
    for limit in (0, 100, 5000, 20_000, 1_000_000):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, str(tmp_path / "shard.h5"), str(limit)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stderr.startswith(f"told: {tmp_path / 'shard.h5'}: the file is larger than"), done.stderr
        assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20, unique=True), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None, database=None)
def test_shuffle_keys_tell_documents_apart_and_change_with_the_seed(values: list[int], seed: int) -> None:
    hashes = np.array([[value, value // 3] for value in values], np.uint64)
    keys = shuffle_keys(hashes, seed)
    assert len(set(map(tuple, keys.tolist()))) == len(values)
    assert (keys[:, 0] != shuffle_keys(hashes, seed ^ 1)[:, 0]).all()
