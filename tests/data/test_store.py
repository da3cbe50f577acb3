"""Reading a store: many shards are one stream, and damage is told, not trained on."""

import os
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc.data import store as module
from crystal_hpc.data.build import build_store
from crystal_hpc.data.catalog import ShardInfo, StoreInfo, digest_of
from crystal_hpc.data.store import BLOCK, TokenStore, read_shard_info, write_shard
from crystal_hpc.errors import StoreError


@pytest.fixture
def info(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> StoreInfo:
    """A store of six shards."""
    built = build_store([corpus], tmp_path / "store", tokenizer_folder, shard_bytes=10_000)
    assert built is not None and len(built.shards) == 6
    return built


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> TokenStore:
    """A store with a shard for almost every document."""
    built = build_store([corpus], tmp_path_factory.mktemp("many"), tokenizer_folder, shard_bytes=300)
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


def test_opening_opens_no_shard(info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = h5py.File

    def note(path: Path, *args: Any, **more: Any) -> h5py.File:
        opened.append(path)
        return real(path, *args, **more)

    monkeypatch.setattr(h5py, "File", note)
    store = TokenStore.open(info.folder)
    assert not opened
    store.read(0, 10)
    store.read(0, info.shards[0].tokens)
    assert opened == [info.folder / info.shards[0].name]


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
    build_store([corpus], info.folder, tokenizer_folder, shard_bytes=10_000)
    TokenStore.open(info.folder).check_digests()


@pytest.mark.parametrize("dataset", ["digests", "doc_offsets"])
def test_damage_beside_the_tokens_is_found_too(info: StoreInfo, dataset: str) -> None:
    path = info.folder / info.shards[2].name
    flip(path, offset_of(path, dataset) + 3)
    with pytest.raises(StoreError, match=r"shard-00002.h5: not the shard that store.json describes"):
        TokenStore.open(info.folder).check_digests()


def test_a_damaged_block_in_a_large_shard_is_named(tmp_path: Path) -> None:
    tokens = np.arange(3 * BLOCK // 2, dtype="<u2")  # three blocks of bytes
    path = tmp_path / "shard-00000.h5"
    write_shard(path, tokens, np.array([0, len(tokens)]), {})
    shard = read_shard_info(path)
    assert (shard.tokens, shard.documents, shard.max_token) == (len(tokens), 1, 65535)
    flip(path, offset_of(path, "tokens") + 2 * BLOCK + 5)
    with pytest.raises(StoreError, match="block 2 of 3"):
        TokenStore(store_of(tmp_path, shard)).check_digests()


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


def damage(path: Path, how: str) -> None:
    """Damages a shard without changing its size, so that only HDF5 can notice."""
    size = path.stat().st_size
    if how == "truncated":
        os.truncate(path, size // 2)
        os.truncate(path, size)
        flip(path, 9)
    elif how == "zeroed":
        path.write_bytes(bytes(size))
    elif how == "other":
        path.write_bytes(b"not HDF5 at all".ljust(size))


@pytest.mark.parametrize("how", ["truncated", "zeroed", "other"])
def test_a_shard_that_hdf5_cannot_read_is_a_store_error(info: StoreInfo, how: str) -> None:
    damage(info.folder / info.shards[0].name, how)
    store = TokenStore.open(info.folder)
    for use in (lambda: store.read(0, 5), lambda: store.document(0), store.check_digests):
        with pytest.raises(StoreError, match=r"shard-00000.h5: the shard is damaged or cannot be read") as caught:
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
    path = info.folder / info.shards[0].name
    write_shard(path, np.zeros(10, "<u4"), np.array([0, 10]), {})
    with pytest.raises(StoreError, match="not of the recorded type and length"):
        TokenStore(info).read(0, 5)
