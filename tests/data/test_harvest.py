"""The demo corpus: complete, repeatable, and with its held-out side kept apart."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.data import harvest as module
from crystal_hpc.data.corpus import Document, Fields, list_units, read_unit
from crystal_hpc.data.harvest import harvest
from crystal_hpc.errors import DiskError, StoreError

NAMES = ["prose.jsonl", "prose-held-out.jsonl", "code.jsonl", "code-held-out.jsonl"]
PROSE = "A sentence of plain words, long enough to be taken for prose by anyone who reads it. "


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    """300 kB of each source from the installation that runs the tests."""
    folder = tmp_path_factory.mktemp("harvest")
    return folder, harvest(folder, 300_000, held_out=0.1)


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for Python's own folders."""
    root = tmp_path / "python"
    for folder in ("lib/pkg/__pycache__", "lib/test", "site/thing-1.dist-info"):
        (root / folder).mkdir(parents=True)
    for number in range(20):
        (root / f"lib/pkg/m{number}.py").write_text(f'"""{PROSE * 3}{number}."""\n\n\ndef f():\n    """{PROSE}"""\n')
    monkeypatch.setattr(module, "_roots", lambda: {"lib": root / "lib", "site-packages": root / "site"})
    monkeypatch.setattr(module, "topics", {})
    return root


def test_a_real_installation_yields_both_sources_within_the_budget(
    real: tuple[Path, dict[str, dict[str, int]]],
) -> None:
    folder, counts = real
    assert list(counts) == NAMES
    for source in ("prose", "code"):
        documents = [*read(folder, f"{source}.jsonl"), *read(folder, f"{source}-held-out.jsonl")]
        size = sum(len(document["text"].encode()) for document in documents)
        assert 300_000 <= size < 1_300_001
        assert size == sum(count["bytes"] for name, count in counts.items() if name.startswith(source))
        assert {document["source"] for document in documents} == {source}


def test_paths_are_relative_and_the_corpus_is_accepted_whole(real: tuple[Path, dict[str, dict[str, int]]]) -> None:
    folder, counts = real
    assert all(not Path(line["path"]).is_absolute() for name in NAMES for line in read(folder, name))
    assert all(sys.prefix not in line["path"] for name in NAMES for line in read(folder, name))
    units = list_units([folder / name for name in NAMES])
    records = [record for unit in units for record, _ in read_unit(unit, Fields())]
    assert all(isinstance(record, Document) for record in records)
    assert len(records) == sum(count["documents"] for count in counts.values())


def test_the_same_installation_gives_the_same_bytes(
    real: tuple[Path, dict[str, dict[str, int]]], tmp_path: Path
) -> None:
    assert harvest(tmp_path, 300_000, held_out=0.1) == real[1]
    assert all((tmp_path / name).read_bytes() == (real[0] / name).read_bytes() for name in NAMES)


def test_no_held_out_text_is_in_training_and_none_is_taken_twice(installation: Path, tmp_path: Path) -> None:
    for number in range(20):  # the same text under two names
        twin = installation / f"lib/pkg/m{number}.py"
        (installation / f"site/copy{number}.py").write_bytes(twin.read_bytes())
    counts = harvest(tmp_path / "out", held_out=0.5)
    texts = [line["text"] for name in NAMES for line in read(tmp_path / "out", name)]
    assert len(texts) == len(set(texts)) == 40
    assert all(count["documents"] for count in counts.values())


def test_a_document_stays_on_its_side_when_the_budget_grows(installation: Path, tmp_path: Path) -> None:
    harvest(tmp_path / "small", 2_000, held_out=0.5)
    harvest(tmp_path / "large", 1_000_000, held_out=0.5)
    for name in NAMES:
        small, large = ([line["text"] for line in read(tmp_path / size, name)] for size in ("small", "large"))
        assert large[: len(small)] == small


def test_files_that_are_empty_or_binary_or_huge_are_left_out(installation: Path, tmp_path: Path) -> None:
    (installation / "lib/empty.py").write_text(" \n")
    (installation / "lib/latin.py").write_bytes(b"# caf\xe9\n")
    (installation / "lib/huge.py").write_text("x = 1\n" * 200_000)
    (installation / "lib/pkg/__pycache__/cached.py").write_text("x = 2\n")
    harvest(tmp_path / "out")
    paths = [line["path"] for name in NAMES for line in read(tmp_path / "out", name)]
    assert not [path for path in paths if any(word in path for word in ("empty", "latin", "huge", "cached"))]


def test_prose_is_descriptions_and_documents_before_docstrings(installation: Path, tmp_path: Path) -> None:
    (installation / "site/thing-1.dist-info/METADATA").write_text(f"Name: thing\nVersion: 1\n\n# Thing\n{PROSE}")
    (installation / "site/thing-1.dist-info/top_level.txt").write_text("thing and some other words")
    (installation / "site/guide.rst").write_text(PROSE * 2)
    (installation / "site/numbers.txt").write_text("0.25 0.75 1.5\n" * 100)
    (installation / "lib/test/mail.txt").write_text(PROSE * 4)
    harvest(tmp_path / "out", held_out=0)
    prose = read(tmp_path / "out", "prose.jsonl")
    assert {line["path"] for line in prose[:2]} == {
        "site-packages/thing-1.dist-info/METADATA",
        "site-packages/guide.rst",
    }
    assert f"# Thing\n{PROSE}" in {line["text"] for line in prose[:2]}
    assert all(line["path"].endswith(".py#docstrings") for line in prose[2:]) and len(prose) == 22
    assert prose[2]["text"].count("\n\n") == 1  # the module's docstring and its function's


def test_modules_are_read_and_never_run(installation: Path, tmp_path: Path) -> None:
    source = f'"""{PROSE * 3}"""\nopen({str(tmp_path / "ran")!r}, "w")\n'
    (installation / "lib/pkg/m0.py").write_text(source)
    (installation / "lib/pkg/m1.py").write_text(f'"""{PROSE * 3}"""\nthis is not Python\n')
    harvest(tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("size", "held_out"), [(0, 0.02), (1000, 1.0), (1000, -0.1)])
def test_impossible_numbers_are_refused(tmp_path: Path, size: int, held_out: float) -> None:
    with pytest.raises(StoreError, match="at least 1 byte"):
        harvest(tmp_path, size, held_out)


def test_an_installation_without_documents_is_an_error_not_an_empty_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_roots", lambda: {"lib": tmp_path / "nowhere"})
    with pytest.raises(StoreError, match="holds no code"):
        harvest(tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="a file, not a folder"):
        harvest(tmp_path / "file" / "out", 1000)


def test_nothing_temporary_is_left(real: tuple[Path, dict[str, dict[str, int]]]) -> None:
    assert sorted(path.name for path in real[0].iterdir()) == sorted(NAMES)


def test_progress_ends_at_the_budget(installation: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    harvest(tmp_path / "out", 2_000, on_progress=lambda *said: seen.append(said))
    assert ("harvesting prose", 2_000, 2_000) in seen and seen[-1] == ("harvesting code", 2_000, 2_000)
