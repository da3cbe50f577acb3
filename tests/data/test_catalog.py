"""What a store is, read fast and without its heavy parts, and what is said when it is not one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.catalog import StoreInfo, digest_of, read_store_info, rows, shard_name
from crystal_hpc.errors import StoreError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> StoreInfo:
    """A finished store of several shards."""
    info = build_store([corpus], tmp_path / "store", tokenizer_folder, Options(shard_tokens=8000))
    assert info is not None
    return info


def imported_by(module: str) -> set[str]:
    """The modules that importing one module brings in, in a fresh interpreter."""
    program = f"import sys, {module}; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], check=True, env=environment, capture_output=True, text=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_what_was_built_is_what_is_read(store: StoreInfo) -> None:
    assert read_store_info(store.folder) == store
    assert len(store.shards) > 2 and store.documents == 120
    assert store.digest == digest_of(shard.digest for shard in store.shards)
    assert (store.bos, store.eos, store.dtype, store.vocab_size, store.name) == (1, 2, "uint16", 534, "store")


def test_rows_share_one_token_with_the_next() -> None:
    assert [rows(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9, 10)] == [0, 0, 0, 1, 1, 2, 2]


def test_reading_a_catalog_needs_the_standard_library_alone() -> None:
    assert not imported_by("crystal_hpc.data.catalog") & {"numpy", "h5py", "tokenizers", "torch", "xxhash"}


@pytest.mark.parametrize("module", ["harvest", "corpus", "tokenizer", "build", "store"])
def test_data_does_not_need_torch(module: str) -> None:
    assert "torch" not in imported_by(f"crystal_hpc.data.{module}")


def test_a_missing_store_is_told_with_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no token store at .*nowhere; build it with: crystal data build"):
        read_store_info(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"not a token store \(store.json is missing\)"):
        read_store_info(tmp_path)


def test_a_half_written_store_says_how_far_it_is(store: StoreInfo) -> None:
    (store.folder / "store.json").unlink()
    (store.folder / shard_name(1)).unlink()
    total = len(store.shards)
    with pytest.raises(StoreError, match=f"{total - 1} of {total} shards are there; run the same build command again"):
        read_store_info(store.folder)


def test_a_store_of_another_format_is_refused(store: StoreInfo) -> None:
    marker = store.folder / "store.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 1}))
    with pytest.raises(StoreError, match="store format 1, but this version reads format 2"):
        read_store_info(store.folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "shards": [{"name": 1}]}'])
def test_a_broken_marker_is_one_clear_line(store: StoreInfo, content: str) -> None:
    (store.folder / "store.json").write_text(content)
    with pytest.raises(StoreError, match="store.json: .*again") as caught:
        read_store_info(store.folder)
    assert "\n" not in str(caught.value)


def test_a_marker_that_was_edited_is_noticed(store: StoreInfo) -> None:
    marker = store.folder / "store.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"tokens": store.tokens + 1}))
    with pytest.raises(StoreError, match="do not fit the shards"):
        read_store_info(store.folder)


def test_a_shard_that_is_missing_or_of_another_size_is_noticed(store: StoreInfo) -> None:
    shard = store.folder / store.shards[1].name
    with open(shard, "ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=rf"shard-00001.h5: {store.shards[1].bytes + 1} bytes, but store.json says"):
        read_store_info(store.folder)
    shard.unlink()
    with pytest.raises(StoreError, match=r"shard-00001.h5: the shard is missing .*; copy the store again, or run"):
        read_store_info(store.folder)
