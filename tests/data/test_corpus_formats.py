"""Corpora in every format: compressed, Parquet, folders; what is cut off or not readable is said in one line."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from crystal_hpc.data.corpus import Document, Fields, Rejected, list_units, read_unit
from crystal_hpc.errors import StoreError

LINES = [b'{"text": "%d %s"}\n' % (n, os.urandom(40).hex().encode()) for n in range(40_000)]
PACK = {"gz": gzip.compress, "zst": zstandard.compress}


def read(*inputs: Path, longest: int = 1 << 20, **more: int | str) -> list[Document | Rejected]:
    units = list_units(inputs, **more)  # type: ignore[arg-type]
    return [record for unit in units for record, _ in read_unit(unit, Fields(), longest=longest)]


@pytest.mark.parametrize("kind", PACK)
def test_members_and_frames_are_read_to_the_end_and_a_cut_is_noticed(tmp_path: Path, kind: str) -> None:
    plain, path = tmp_path / "plain.jsonl", tmp_path / f"packed.jsonl.{kind}"
    plain.write_bytes(b"".join(LINES))
    whole = b"".join(PACK[kind](b"".join(part)) for part in (LINES[:30_000], [], LINES[30_000:]))
    path.write_bytes(whole)
    assert read(path) == read(plain)
    for size in (len(whole) - 1, len(whole) - 9, len(whole) // 2, 5):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match="is cut off; fetch it again"):
            read(path)
    path.write_bytes(whole + b"garbage that is no member")
    with pytest.raises(StoreError, match="is damaged|is cut off"):
        read(path)


def test_parquet_rows_are_documents_or_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", None, b" ", b"\xff", b"a\0", b"x" * 50, b"last"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts, "id": list(range(7)), "other": ["y"] * 7}), path, row_group_size=2)
    for unit_bytes in (1, 1 << 20):
        found = read(path, longest=20, unit_bytes=unit_bytes)
        assert [found[0], found[-1]] == [Document("one", "0"), Document("last", "6")]
        reasons = [(record.reason, record.at) for record in found if isinstance(record, Rejected)]
        expected = ["no text", "empty text", "not UTF-8", "NUL character", "longer than 20 bytes"]
        assert reasons == [(reason, f"row {number}") for number, reason in enumerate(expected, 1)]
    (unit,) = list_units([path])
    for column, said in (("body", "no column 'body' .* text, id, other"), ("id", "holds int64, not text")):
        with pytest.raises(StoreError, match=said):
            list(read_unit(unit, Fields(text=column)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match="damaged, or not Parquet"):
        list_units([path])


def test_a_folder_of_text_files_is_a_document_each(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in (("sub/b.txt", b"\xef\xbb\xbfb"), ("a\n.md", b"a"), (".hidden", b"h"), ("z", b"\xff")):
        (tmp_path / name).write_bytes(content)
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).write_text("odd")
    for unit_bytes in (1, 1000):
        found = read(tmp_path, unit_bytes=unit_bytes)
        assert [one for one in found if isinstance(one, Rejected)] == [Rejected("not UTF-8", "file z", "�")]
        assert Document("b", path="sub/b.txt") in found and len(found) == 4
        assert Document("odd", path="\\xff.txt") in found


def test_a_folder_with_data_files_yields_those_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert read(tmp_path) == [Document("a")]


@pytest.mark.parametrize("name", ["b.json", "b.jsonl.lz4", "b.csv", "b.parquet.tmp", "b.jsonl.zstd"])
def test_what_looks_like_data_in_a_folder_of_data_is_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / name).write_text('{"text": "b"}')
    with pytest.raises(StoreError, match=f"holds {name} beside other files: is that data"):
        list_units([tmp_path])
    assert read(tmp_path / "a.jsonl") == [Document("a")]


def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, content in (("a.bz2", b"BZh9"), ("a.xz", b"\xfd7zXZ"), ("a.zip", b"PK\x03\x04"), ("a.txt", b"words")):
        (tmp_path / name).write_bytes(content)
    for name, said in [
        ("a.bz2", "bzip2, which is not read"),
        ("a.xz", "xz, which"),
        ("a.zip", "zip, which"),
        ("a.txt", "not recognized .* JSON Lines"),
        ("empty", "holds no"),
        ("miss\ning", "no such corpus file"),
    ]:
        with pytest.raises(StoreError, match=said) as caught:
            list_units([tmp_path / name])
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert read(tmp_path / "a.txt", format="text") == [Document("words", path="a.txt")]
    (tmp_path / "unnamed").write_text(' {"text": "a"}')
    assert read(tmp_path / "unnamed") == [Document("a")]
