"""Reading documents: every line is used or counted, and the order belongs to the texts, not to the files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from crystal_hpc.data.corpus_index import CorpusIndex, Document, index_corpus, parse_line, read_document, read_documents
from crystal_hpc.errors import StoreError

Write = Callable[..., Path]


def texts_of(index: CorpusIndex) -> list[str]:
    return [document.text for document in read_documents(index, 0, len(index.entries))]


def test_every_document_is_found_and_read_back(corpus: Path, texts: list[str]) -> None:
    index = index_corpus([corpus])
    assert sorted(texts_of(index)) == sorted(texts)
    assert texts_of(index) != texts
    assert index.entries["text_bytes"].sum() == sum(len(text.encode()) for text in texts)


def test_a_line_gives_text_source_and_path() -> None:
    assert parse_line(b'{"text": "a", "source": "code", "path": "lib/a.py"}') == Document("a", "code", "lib/a.py")
    assert parse_line(b'{"text": "a", "id": 7}') == Document("a", "", "7")


def test_the_order_does_not_depend_on_how_the_documents_lie_in_files(jsonl: Write, texts: list[str]) -> None:
    whole = index_corpus([jsonl(texts, "whole")])
    a, b = jsonl(texts[50:], "z"), jsonl(reversed(texts[:50]), "a")
    for files in ([a, b], [b, a]):
        parts = index_corpus(files)
        assert texts_of(parts) == texts_of(whole)
        assert parts.digest == whole.digest


def test_the_order_depends_on_the_seed(corpus: Path) -> None:
    one, two = index_corpus([corpus], seed=1), index_corpus([corpus], seed=2)
    assert texts_of(one) != texts_of(two) and sorted(texts_of(one)) == sorted(texts_of(two))
    assert one.digest != two.digest


def test_duplicates_are_kept(jsonl: Write) -> None:
    index = index_corpus([jsonl(["same", "other", "same"])])
    assert sorted(texts_of(index)) == ["other", "same", "same"]


def test_a_part_of_the_order_can_be_read_alone(corpus: Path) -> None:
    index = index_corpus([corpus])
    assert [document.text for document in read_documents(index, 10, 13)] == texts_of(index)[10:13]


def test_a_document_is_read_from_its_place(corpus: Path, texts: list[str]) -> None:
    first, second = corpus.read_bytes().splitlines(keepends=True)[:2]
    with open(corpus, "rb") as file:
        assert read_document(file, len(first), len(second)).text == texts[1]


def test_bad_lines_are_counted_by_reason(jsonl: Write, texts: list[str]) -> None:
    path = jsonl(texts * 10)
    with open(path, "ab") as file:
        file.write(b'{"text": "cut sh\n\n   \n{"txt": "a"}\n["text"]\n{"text": 5}\n{"text": " \\n"}\n')
        file.write(b'{"text": "half \\ud800 a pair"}\n{"text": "caf\xe9"}\n' + b"[" * 100_000)
    index = index_corpus([path])
    assert len(index.entries) == 1200
    assert index.rejected == {
        "blank line": 2,
        "empty text": 1,
        "lone surrogate": 1,
        "no text": 2,
        "not UTF-8 JSON": 3,
        "text is not a string": 1,
    }


def test_a_surrogate_pair_in_json_escapes_is_a_character(jsonl: Write, tmp_path: Path) -> None:
    path = tmp_path / "pair.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert texts_of(index_corpus([path])) == ["😀"]


def test_too_many_bad_lines_are_an_error_that_names_the_first(jsonl: Write, texts: list[str]) -> None:
    good = jsonl(texts, "good")
    bad = jsonl(["fine"], "bad")
    with open(bad, "a") as file:
        file.write("nonsense\n" * 3)
    with pytest.raises(StoreError, match=r"3 of 124 lines .* line 2 of .*bad \(not UTF-8 JSON\)") as caught:
        index_corpus([good, bad])
    assert "\n" not in str(caught.value)
    assert index_corpus([good, bad], most_rejected=0.05).rejected == {"not UTF-8 JSON": 3}


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_corpus_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(StoreError, match=r"the corpus is empty: .*empty\.jsonl"):
        index_corpus([tmp_path / "empty.jsonl"])


def test_files_that_cannot_be_a_corpus_are_refused(tmp_path: Path) -> None:
    (tmp_path / "packed.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    for path, said in [
        ("missing", "no such corpus file"),
        (".", "not a file"),
        ("packed.jsonl.gz", r"\(gzip\); unpack"),
    ]:
        with pytest.raises(StoreError, match=said):
            index_corpus([tmp_path / path])
    with pytest.raises(StoreError, match="no corpus files"):
        index_corpus([])


def test_a_seed_out_of_range_is_refused(corpus: Path) -> None:
    for seed in (-1, 2**64):
        with pytest.raises(StoreError, match="out of range"):
            index_corpus([corpus], seed)


def test_a_file_that_changes_after_indexing_is_noticed(jsonl: Write) -> None:
    path = jsonl(["first text", "other text"])
    index = index_corpus([path])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("fresh text", "newer text")))
    with pytest.raises(StoreError, match="was changed while it was read"):
        read_documents(index, 0, 2)


def test_progress_counts_the_bytes_of_all_files(jsonl: Write, texts: list[str]) -> None:
    files = [jsonl(texts * 5, "one"), jsonl(texts * 5, "two")]
    seen: list[tuple[str, int, int]] = []
    index_corpus(files, on_progress=lambda *said: seen.append(said))
    assert len(seen) > 4 and seen == sorted(seen)
    assert {(what, total) for what, _, total in seen} == {("indexing", sum(path.stat().st_size for path in files))}
