"""Reading documents: every record is used or counted, whatever way the files are named and cut."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crystal_hpc.data.corpus import (
    BLANK,
    Document,
    Fields,
    Rejected,
    Rejections,
    Unit,
    list_units,
    read_unit,
    text_of_all,
)
from crystal_hpc.errors import StoreError

REPOSITORY = Path(__file__).parents[2]
Write = Callable[..., Path]


def records(units: Sequence[Unit], **more: int) -> list[Document | Rejected]:
    return [record for unit in units for record, _ in read_unit(unit, Fields(), **more)]


def only_rejection(path: Path, **more: int) -> Rejected:
    (record,) = records(list_units([path]), **more)
    assert isinstance(record, Rejected)
    return record


@pytest.fixture
def raw(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes a JSON Lines file of these bytes."""

    def write(content: bytes, name: str = "raw.jsonl") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def test_every_document_is_read_and_progress_ends_at_the_size(corpus: Path, texts: list[str]) -> None:
    (unit,) = list_units([corpus])
    read = list(read_unit(unit, Fields()))
    assert [record for record, _ in read] == [Document(text) for text in texts]
    done = [count for _, count in read]
    assert done == sorted(done) and done[-1] == unit.size == corpus.stat().st_size


def test_a_record_says_its_id_language_and_path(raw: Write) -> None:
    path = raw(b'{"text": "a", "id": 7, "language": "de", "path": "b/c"}\n{"text": "a", "id": null, "path": [1]}')
    assert records(list_units([path])) == [Document("a", "7", "de", "b/c"), Document("a")]
    path = raw(b'{"t": "a", "n": 123456789012345678901234, "text": 5, "l": true}\n')
    (unit,) = list_units([path])
    fields = Fields(text="t", id="n", language="l")
    assert [record for record, _ in read_unit(unit, fields)] == [Document("a", "123456789012345678901234", "True")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"   ", BLANK),
        (b"\r", BLANK),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": "cut sh', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "raw \x00"}', "not JSON"),
        (b'["text"]', "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"5", "not a JSON object"),
        (b'{"txt": "a"}', "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": 5}', "text is not a string"),
        (b'{"text": ["a"]}', "text is not a string"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n\\u3000"}', "empty text"),
        (b'{"text": "a\\u0000b"}', "NUL character"),
        (b'{"text": "half \\ud800 a pair"}', "lone surrogate"),
        (b'{"text": "a", "id": "\\udfff"}', "lone surrogate"),
        (b'{"text": "' + b"a" * 200 + b'"}', "longer than 200 bytes"),
    ],
)
def test_an_unusable_line_is_rejected_with_reason_place_and_sample(raw: Write, line: bytes, reason: str) -> None:
    good = b'{"text": "good"}\n'
    path = raw(good + line + b"\n" + good)
    longest = 200 if reason.startswith("longer") else 1 << 20
    first, bad, last = records(list_units([path]), longest=longest)
    assert first == last == Document("good")
    assert isinstance(bad, Rejected) and (bad.reason, bad.at) == (reason, f"byte {len(good)}")
    assert len(bad.sample) <= 200 and bad.sample.isprintable() and (reason == BLANK or bad.sample)


def test_what_only_pythons_own_reader_accepts_is_a_document(raw: Write) -> None:
    path = raw(b'{"text": "a", "score": NaN}\n{"text": "\\ud83d\\ude00"}\n{"text": "b", "x": "\\ud800"}')
    assert records(list_units([path])) == [Document("a"), Document("😀"), Document("b")]


def test_a_byte_order_mark_and_crlf_are_no_part_of_a_document(raw: Write) -> None:
    path = raw(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert records(list_units([path])) == [Document("a"), Document("b")]
    assert records(list_units([path], unit_bytes=4)) == [Document("a"), Document("b")]


LINES = st.lists(st.text("ab\r ", max_size=12), max_size=12)


@given(lines=LINES, unit_bytes=st.integers(1, 60), ended=st.booleans())
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_units_of_every_size_give_each_line_once(
    tmp_path: Path, lines: list[str], unit_bytes: int, ended: bool
) -> None:
    path = tmp_path / "lines.jsonl"
    content = "\n".join(json.dumps({"text": line}) if "b" in line else line for line in lines)
    path.write_bytes((content + "\n" * ended).encode())
    whole = records(list_units([path]))
    units = list_units([path], unit_bytes=unit_bytes)
    assert sum(unit.size for unit in units) == path.stat().st_size
    assert records(units) == whole
    assert len([record for record in whole if isinstance(record, Document)]) == sum("b" in line for line in lines)


def test_a_file_in_parts_of_every_size_up_to_whole_gives_each_line_once(raw: Write) -> None:
    path = raw(b'{"text": "one"}\n\n{"text": "three"}\nnonsense\n{"text": "five"}')
    whole = records(list_units([path]))
    assert len(whole) == 5
    for size in range(1, path.stat().st_size + 1):
        assert records(list_units([path], unit_bytes=size)) == whole


def test_the_units_do_not_depend_on_the_order_of_the_inputs(jsonl: Write, texts: list[str]) -> None:
    files = [jsonl(texts[:20], "b.jsonl"), jsonl(texts[20:50], "a.jsonl"), jsonl(texts[50:], "c.jsonl")]
    units = list_units(files, unit_bytes=9_000)
    assert units == list_units(files[::-1], unit_bytes=9_000) == list_units([files[0].parent], unit_bytes=9_000)
    assert [unit.path.name for unit in units] == sorted(unit.path.name for unit in units) and len(units) > 6


def test_a_file_that_is_named_twice_is_refused(jsonl: Write, tmp_path: Path) -> None:
    path = jsonl(["a"])
    (tmp_path / "link.jsonl").symlink_to(path)
    for inputs in ([path, path], [path, tmp_path / "." / ".." / tmp_path.name / path.name], [tmp_path]):
        with pytest.raises(StoreError, match="named twice"):
            list_units(inputs)


def test_empty_files_have_no_units_and_no_inputs_are_an_error(raw: Write) -> None:
    assert list_units([raw(b"")]) == []
    with pytest.raises(StoreError, match="no corpus files were named"):
        list_units([])
    with pytest.raises(StoreError, match="the corpus is empty"):
        list(text_of_all([raw(b"\n\n")], Fields()))


def test_nonsense_settings_are_refused(corpus: Path) -> None:
    with pytest.raises(StoreError, match="too small"):
        list_units([corpus], unit_bytes=0)
    with pytest.raises(StoreError, match="choose one of jsonl, parquet, text"):
        list_units([corpus], format="csv")


def test_a_file_that_changes_before_or_while_it_is_read_is_noticed(jsonl: Write) -> None:
    path = jsonl(["a", "b"])
    (unit,) = list_units([path])
    reading = read_unit(unit, Fields())
    next(reading)
    with open(path, "a") as file:
        file.write('{"text": "c"}\n')
    for late in (reading, read_unit(unit, Fields())):
        with pytest.raises(StoreError, match="was changed while it was read; run"):
            list(late)
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        list(read_unit(unit, Fields()))


def test_all_texts_are_read_for_training_and_progress_is_told(jsonl: Write, texts: list[str]) -> None:
    files = [jsonl(texts[60:], "b.jsonl"), jsonl(texts[:60], "a.jsonl")]
    seen: list[tuple[str, int, int]] = []
    assert list(text_of_all(files, Fields(), lambda *said: seen.append(said), what="counting")) == texts
    assert seen == sorted(seen) and seen[-1][0] == "counting"
    assert {total for _, _, total in seen} == {sum(path.stat().st_size for path in files)}


def test_too_many_bad_records_are_an_error_that_shows_one(jsonl: Write, texts: list[str]) -> None:
    path = jsonl(texts)
    with open(path, "a") as file:
        file.write('nonsense\n\n\n{"text": " "}\nnonsense\n')
    with pytest.raises(StoreError, match=r"3 of 123 records .* 1.00% allowed \(1 empty text, 2 not JSON\)") as caught:
        list(text_of_all([path], Fields()))
    assert "\n" not in str(caught.value) and f"of {path} (" in str(caught.value) and "byte" in str(caught.value)
    assert len(list(text_of_all([path], Fields(), most_rejected=0.03))) == 120


REJECTED = st.tuples(
    st.sampled_from(["a", "b"]),
    st.builds(Rejected, st.sampled_from(["r", "s", BLANK]), st.integers(0, 99).map("byte {}".format), st.just("x")),
)


@given(found=st.lists(REJECTED, unique_by=lambda one: (one[0], one[1].at)), data=st.data())
@settings(max_examples=100, deadline=None, database=None)
def test_the_account_is_the_same_however_it_came_together(
    found: list[tuple[str, Rejected]], data: st.DataObject
) -> None:
    whole = Rejections(keep=5)
    for path, rejected in found:
        whole.add(path, rejected)
    parts = [Rejections(keep=5) for _ in range(3)]
    for path, rejected in data.draw(st.permutations(found)):
        data.draw(st.sampled_from(parts)).add(path, rejected)
    merged = Rejections(keep=5)
    for part in data.draw(st.permutations(parts)):
        merged.merge(Rejections.from_json(json.loads(json.dumps(part.as_json()))))
    assert merged.as_json() == whole.as_json()
    assert sum(whole.counts.values()) == len(found)
    for reason, samples in whole.samples().items():
        assert reason != BLANK and len(samples) == min(5, whole.counts[reason])


def limited(program: str, path: Path, bytes_of_memory: int) -> str:
    """Runs a program on a file in a process of its own, which may take so much address space; what it printed."""
    head = (
        "import resource, sys; from pathlib import Path\n"
        "from crystal_hpc.data.corpus import *\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({bytes_of_memory}, {bytes_of_memory}))\n"
        "path = Path(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + program, path],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MB = 1_000_000


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="this system cannot limit memory")
def test_a_line_without_end_is_skipped_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "endless.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(600):
            file.write(b"x" * MB)
        file.write(b'\n{"text": "last"}\n')
    program = (
        "for unit in list_units([path], unit_bytes=1 << 40):\n"
        "    for r, _ in read_unit(unit, Fields(), longest=1000):\n"
        "        print(getattr(r, 'reason', None) or r.text)\n"
    )
    assert limited(program, path, 500 * MB).splitlines() == ["first", "longer than 1000 bytes", "last"]


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="this system cannot limit memory")
def test_a_document_of_200_mb_passes_in_a_small_multiple_of_that(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"a line of text\\n" * (MB // 16))
        file.write(b'", "id": "long"}\n{"text": "b"}\n')
    program = (
        "for unit in list_units([path]):\n    for r, _ in read_unit(unit, Fields()):\n        print(len(r.text))\n"
    )
    assert limited(program, path, 1200 * MB).split() == [str(200 * (MB // 16) * 15), "1"]
