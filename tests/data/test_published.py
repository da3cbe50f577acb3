"""Rows as Crystal published them: read as stored, numbered through the files, and refused in one line when wrong."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from crystal_hpc.config.load import load_run
from crystal_hpc.data.batches import PhaseBatches, held_out_batches
from crystal_hpc.data.order import run_orders
from crystal_hpc.data.published import PublishedRows, read_published_info
from crystal_hpc.data.rows import RowSource
from crystal_hpc.data.sources import open_source, read_source_info, read_sources
from crystal_hpc.errors import ConfigError, StoreError

LENGTH = 16


def write(path: Path, data: npt.NDArray[Any], name: str = "data") -> Path:
    """One file as Crystal's data preparation writes it."""
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["n_examples"] = len(data)
        file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]), compression="gzip")
    return path


def made_up(rows: int, seed: int, length: int = LENGTH) -> npt.NDArray[np.int32]:
    """Rows whose last labels are EOS and not the next token, and of which some do not count: as after Crystal's FIM."""
    chance = np.random.default_rng(seed)
    ids = chance.integers(3, 500, (rows, length), np.int32)
    labels = np.concatenate([ids[:, 1:], np.full((rows, 1), 2, np.int32)], axis=1)
    mask = np.ones_like(ids)
    mask[::3, -4:] = 0
    return np.stack([ids, mask, labels], axis=1)


@pytest.fixture
def parts() -> list[npt.NDArray[np.int32]]:
    return [made_up(rows, seed) for seed, rows in enumerate((7, 1, 12))]


@pytest.fixture
def folder(tmp_path: Path, parts: list[npt.NDArray[np.int32]]) -> Path:
    for number in (2, 0, 1):
        write(tmp_path / "rows" / f"data-{number:05d}.h5", parts[number])
    return tmp_path / "rows"


def test_every_row_is_read_as_it_is_stored(folder: Path, parts: list[npt.NDArray[np.int32]]) -> None:
    info = read_source_info(folder)
    source = open_source(info, 512)
    assert isinstance(source, PublishedRows)
    assert (info.layout, info.documents, info.tokens, info.row_length) == ("rows", 20, 20 * LENGTH + 1, LENGTH)
    assert (source.rows(LENGTH), source.rows(LENGTH + 1), source.rows(LENGTH // 2)) == (20, 0, 0)
    for number, (ids, mask, labels) in enumerate(np.concatenate(parts)):
        found = source.read_row(number, LENGTH)
        assert found[2].dtype == bool
        for one, other in zip(found, (ids, labels, mask == 1), strict=True):
            np.testing.assert_array_equal(one, other)
    for outside in (-1, 20):
        with pytest.raises(IndexError):
            source.read_row(outside, LENGTH)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read_row(3, LENGTH)[0], parts[0][3, 0])


def test_the_digest_changes_with_names_sizes_and_rows(folder: Path) -> None:
    before = read_published_info(folder).digest
    assert read_published_info(folder).digest == before
    (folder / "data-00001.h5").rename(folder / "data-00009.h5")
    assert read_published_info(folder).digest != before
    (folder / "data-00009.h5").rename(folder / "data-00001.h5")
    write(folder / "data-00001.h5", made_up(2, 9))
    assert read_published_info(folder).digest != before


def test_whatever_is_wrong_is_one_line_that_names_the_file(folder: Path, tmp_path: Path) -> None:
    data = made_up(2, 1)
    for name, change, said in [
        ("two-rows", lambda path: write(path, data[:, :2]), "data-00001.h5: no dataset 'data' of int32"),
        ("floats", lambda path: write(path, data.astype(np.float32)), "data-00001.h5: no dataset 'data' of int32"),
        ("flat", lambda path: write(path, data[0]), "data-00001.h5: no dataset 'data' of int32"),
        ("name", lambda path: write(path, data, "tokens"), "neither a token store .* nor rows"),
        ("length", lambda path: write(path, made_up(2, 1, 8)), "data-00001.h5: rows of 8 tokens, but .* have 16"),
        ("text", lambda path: path.write_text("text"), "data-00001.h5: damaged or cannot be read"),
        ("cut", lambda path: path.write_bytes(path.read_bytes()[:900]), "data-00001.h5: damaged or cannot be read"),
    ]:
        target = tmp_path / name
        for path in folder.iterdir():
            target.mkdir(exist_ok=True)
            (target / path.name).write_bytes(path.read_bytes())
        change(target / "data-00001.h5")
        with pytest.raises(StoreError, match=said) as caught:
            read_source_info(target)
        assert "\n" not in str(caught.value), name
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"no rows; expected \*.h5"):
        read_published_info(tmp_path / "empty")
    write(tmp_path / "none" / "data-0.h5", data[:1])
    with h5py.File(tmp_path / "none" / "data-0.h5", "w") as file:
        file.create_dataset("data", (0, 3, 16), np.int32)
    with pytest.raises(StoreError, match="no rows"):
        read_source_info(tmp_path / "none")


def test_a_file_that_goes_bad_later_is_found_when_it_is_read(folder: Path, parts: list[npt.NDArray[np.int32]]) -> None:
    info = read_published_info(folder)
    (folder / "data-00001.h5").unlink()
    with pytest.raises(StoreError, match="data-00001.h5: the file is missing"):
        PublishedRows(info).read_row(7, LENGTH)
    write(folder / "data-00001.h5", made_up(3, 1))
    with pytest.raises(StoreError, match=r"data-00001.h5: \(3, 3, 16\) where it was \(1, 3, 16\)"):
        PublishedRows(info).read_row(7, LENGTH)
    path = folder / "data-00002.h5"
    with h5py.File(path, "r") as file:
        chunk = file["data"].id.get_chunk_info(5)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    source = PublishedRows(info)
    np.testing.assert_array_equal(source.read_row(12, LENGTH)[0], parts[2][4, 0])
    with pytest.raises(StoreError, match="data-00002.h5: damaged or cannot be read"):
        source.read_row(13, LENGTH)
    write(folder / "data-00001.h5", made_up(1, 1))
    with pytest.raises(StoreError, match="data-00002.h5: damaged or cannot be read"):
        PublishedRows(info).check_digests()


@pytest.mark.parametrize(("place", "bad"), [(0, 512), (2, 512), (0, -1), (2, -100)])
def test_ids_that_the_model_does_not_have_are_caught_before_it_sees_them(tmp_path: Path, place: int, bad: int) -> None:
    data = made_up(3, 0)
    data[1, place, 5] = bad
    write(tmp_path / "rows" / "data-0.h5", data)
    source = PublishedRows(read_published_info(tmp_path / "rows"), 512)
    source.read_row(0, LENGTH)
    with pytest.raises(StoreError, match=r"data-0.h5: row 1 holds ids outside of 0..511"):
        source.read_row(1, LENGTH)


def with_rows(config: dict[str, Any], folder: Path, **phase: Any) -> dict[str, Any]:
    """The tiny run with its source `code` replaced by published rows."""
    config["data"]["sources"]["code"] = str(folder)
    for content in config["phases"]:
        content.update(phase)
    return config


def test_a_run_mixes_published_rows_with_a_store(
    folder: Path,
    parts: list[npt.NDArray[np.int32]],
    tiny_config: dict[str, Any],
    write_config: Callable[..., Path],
) -> None:
    run = load_run(write_config(with_rows(tiny_config, folder)))
    infos = read_sources(run)
    order = run_orders(run, infos.tokens)[1]
    assert order.rows[order.sources.index("code")] == 20
    sources: dict[str, RowSource] = {name: open_source(info, 536) for name, info in infos.training.items()}
    batches = PhaseBatches(order, sources, 8, 2)
    batch = batches.read(0)
    batches.close()
    where, _, rows = order.samples(np.arange(8))
    every, counted = np.concatenate(parts), 0
    assert batch.loss_mask is not None
    for position, (number, row) in enumerate(zip(where, rows, strict=True)):
        tokens, labels, mask = (x.view(8, LENGTH)[position] for x in (batch.tokens, batch.labels, batch.loss_mask))
        if order.sources[number] == "code":
            for one, other in zip((tokens, mask, labels), every[row], strict=True):
                np.testing.assert_array_equal(one.numpy(), other)
            counted += 1
        else:
            assert mask.all() and (labels[:-1] == tokens[1:]).all()
    assert 0 < counted < 8
    held_out = held_out_batches(sources["code"], LENGTH, 4, 2, 0, 1)
    assert [batch.loss_mask is not None for batch in held_out] == [True, True]
    np.testing.assert_array_equal(held_out[1].labels[0].numpy(), every[2:4, 2])


def test_a_run_that_asks_published_rows_for_what_they_cannot_do_is_refused(
    folder: Path, tmp_path: Path, tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    config = with_rows(tiny_config, folder, sequence_length=8, fim={"code": {"rate": 0.5}})
    config["phases"][0]["mixture"] = {"code": 1.0}
    config["data"]["held_out"] = {"seen": str(write(tmp_path / "seen" / "data-0.h5", made_up(3, 5)).parent)}
    with pytest.raises(ConfigError) as caught:
        read_sources(load_run(write_config(config)))
    said = caught.value.problems
    assert "phases.0.sequence_length: 8, but source 'code' was published in rows of 16 tokens; make it 16" in said
    assert "phases.2.sequence_length: 8, but held-out 'seen' was published in rows of 16 tokens; make it 16" in said
    assert sum("fim.code: its rows were published as they are to be read" in problem for problem in said) == 3


def test_planning_on_ordinary_stores_needs_neither_h5py_nor_numpy(
    tiny_config: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    tiny_config["phases"][0]["fim"] = {"prose": {"rate": 0.5}}
    program = (
        "import sys; from pathlib import Path; from crystal_hpc.config.load import load_run\n"
        "from crystal_hpc.data.sources import read_sources; read_sources(load_run(Path(sys.argv[1])))\n"
        "print(sorted({'numpy', 'h5py', 'tokenizers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, write_config(tiny_config)], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
