"""Building a store: the same bytes however it was interrupted, and never a store that was not asked for."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from crystal_hpc import files
from crystal_hpc.data.build import build_store, shard_bounds
from crystal_hpc.data.catalog import StoreInfo, read_store_info
from crystal_hpc.data.corpus_index import index_corpus, read_documents
from crystal_hpc.data.store import TokenStore
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import DiskError, StoreError

REPOSITORY = Path(__file__).parents[2]
SHARD = 10_000  # bytes of text: the corpus makes several shards
Build = Callable[..., StoreInfo]


@pytest.fixture
def build(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> Build:
    """Builds a store of the test corpus in tmp_path/<folder>/store and returns its info."""

    def run(folder: str = "a", inputs: list[Path] | None = None, **settings: Any) -> StoreInfo:
        settings = {"shard_bytes": SHARD} | settings
        info = build_store(inputs or [corpus], tmp_path / folder / "store", tokenizer_folder, **settings)
        assert info is not None
        return info

    return run


def content(info_or_folder: StoreInfo | Path) -> dict[str, bytes]:
    """Every file of a store but the plan, which holds the times of the inputs."""
    folder = info_or_folder if isinstance(info_or_folder, Path) else info_or_folder.folder
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "build.json"}


def in_a_process(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program that gets `build(...)`, which builds what sys.argv names."""
    head = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom crystal_hpc.data.build import build_store\n"
        "def build(**more):\n    inputs, out, tokenizer = map(Path, sys.argv[1:])\n"
        f"    return build_store([inputs], out, tokenizer, shard_bytes={SHARD}, **more)\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", head + program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_store_holds_every_document_with_its_ends_in_shuffled_order(
    build: Build, corpus: Path, tokenizer_folder: Path
) -> None:
    store = TokenStore(build())
    tokenizer = Tokenizer.load(tokenizer_folder)
    documents = read_documents(index_corpus([corpus]), 0, 120)
    for number, document in enumerate(documents):
        assert store.document(number).tolist() == [1, *tokenizer.encode(document.text), 2]
    assert store.tokens == sum(len(store.document(number)) for number in range(120))


def test_without_bos_and_eos_a_document_is_its_tokens(build: Build, corpus: Path, tokenizer_folder: Path) -> None:
    info = build(bos=False, eos=False)
    text = read_documents(index_corpus([corpus]), 0, 1)[0].text
    assert Tokenizer.load(tokenizer_folder).decode(TokenStore(info).document(0)) == text
    assert (info.bos, info.eos) == (None, None)


def test_two_builds_are_identical_byte_for_byte(build: Build) -> None:
    assert content(build("a")) == content(build("b"))


def test_the_order_and_number_of_input_files_do_not_matter(
    build: Build, jsonl: Callable[..., Path], texts: list[str]
) -> None:
    a, b = jsonl(texts[:70], "a.jsonl"), jsonl(texts[:69:-1], "b.jsonl")
    assert content(build("one")) == content(build("two", [a, b])) == content(build("three", [b, a]))


def test_a_kill_in_the_middle_leaves_no_trace_after_the_rerun(
    build: Build, tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    undisturbed = content(build("undisturbed"))
    out = tmp_path / "killed" / "store"
    die_before_the_third_shard_gets_its_name = (
        "rename = os.replace\n"
        "def replace(a, b):\n"
        "    if 'shard-00002' in str(b):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(a, b)\n"
        "os.replace = replace\nbuild()\n"
    )
    done = in_a_process(die_before_the_third_shard_gets_its_name, corpus, out, tokenizer_folder)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(out.glob("shard-*.h5"))) == 2 and len(list(out.glob("*.pending"))) == 1
    with pytest.raises(StoreError, match="2 of 6 shards are there"):
        read_store_info(out)
    first = (out / "shard-00000.h5").stat()
    assert content(build("killed")) == undisturbed
    assert (out / "shard-00000.h5").stat().st_mtime_ns == first.st_mtime_ns  # kept, not made again


def test_a_stop_is_clean_and_the_next_run_goes_on(
    build: Build, tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    out = tmp_path / "stopped" / "store"
    stops = 0
    asked = iter([False] * 4 + [True])
    while (
        build_store([corpus], out, tokenizer_folder, shard_bytes=SHARD, should_stop=lambda: next(asked, False)) is None
    ):
        stops += 1
        assert not list(out.glob("*.pending")) and not (out / "store.json").exists()
        assert len(list(out.glob("shard-*.h5"))) >= stops
    assert stops == 1
    assert content(out) == content(build("undisturbed"))


def test_a_finished_store_is_not_touched_by_a_rerun(build: Build) -> None:
    info = build()
    before = {path.name: path.stat().st_mtime_ns for path in info.folder.iterdir()}
    watched: list[tuple[str, int, int]] = []
    assert build(on_progress=lambda *said: watched.append(said)) == info
    assert {path.name: path.stat().st_mtime_ns for path in info.folder.iterdir()} == before
    assert not watched  # not even the corpus is read again


def test_the_same_documents_in_other_files_are_the_same_store(build: Build, jsonl: Any, texts: list[str]) -> None:
    info = build()
    assert build(inputs=[jsonl(texts, "moved.jsonl")]) == info


def test_a_shard_that_was_deleted_or_cut_is_made_again(build: Build) -> None:
    info = build()
    before = content(info)
    (info.folder / "shard-00001.h5").unlink()
    os.truncate(info.folder / "shard-00002.h5", 3000)
    assert build() == info and content(info) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 2}, "seed 1, not 2"),
        ({"bos": False}, "BOS 1, not None"),
        ({"eos": False}, "EOS 2, not None"),
        ({"shard_bytes": 5000}, "shard size 10000, not 5000"),
    ],
)
def test_a_rerun_with_other_settings_is_refused(build: Build, change: dict[str, Any], said: str) -> None:
    before = content(build())
    with pytest.raises(StoreError, match=f"{said}; choose another folder, or build afresh"):
        build(**change)
    assert content(build()) == before
    fresh = build(fresh=True, **change)
    assert content(fresh) == content(build("other", **change))


def test_a_rerun_with_another_corpus_or_tokenizer_is_refused(
    build: Build, jsonl: Any, texts: list[str], corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    info = build()
    with pytest.raises(StoreError, match=r"store, perhaps unfinished, with corpus \w+, not \w+; choose"):
        build(inputs=[jsonl(texts[:100])])
    other = tmp_path / "tokenizer.json"
    other.write_text((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8").replace("fim_pad", "fim_pod"))
    with pytest.raises(StoreError, match=rf"tokenizer {info.tokenizer}, not \w+; choose"):
        build_store([corpus], info.folder, other, shard_bytes=SHARD)


def test_building_afresh_deletes_the_store_and_nothing_else(build: Build) -> None:
    info = build(shard_bytes=5000)
    (info.folder / "notes.txt").write_text("mine")
    assert len(build(shard_bytes=50_000, fresh=True).shards) == 2
    assert (info.folder / "notes.txt").read_text() == "mine" and len(list(info.folder.glob("shard-*"))) == 2


def test_a_plan_that_is_missing_or_broken_is_refused(build: Build) -> None:
    info = build()
    (info.folder / "build.json").write_text("{")
    with pytest.raises(StoreError, match="not a build plan"):
        build()
    (info.folder / "build.json").unlink()
    with pytest.raises(StoreError, match="a store without its build.json"):
        build()


def test_rejected_lines_are_recorded_in_the_store(build: Build, jsonl: Any, texts: list[str]) -> None:
    path = jsonl(texts)
    with open(path, "a") as file:
        file.write('{"text": "\\ud800"}\n\n')
    assert read_store_info(build(inputs=[path]).folder).rejected == {"blank line": 1, "lone surrogate": 1}


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_written_shard(
    build: Build, tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    out = tmp_path / "full" / "store"
    limited = (
        "import resource\nfrom crystal_hpc.errors import DiskError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "try:\n    build()\nexcept DiskError as error:\n    sys.exit(f'told: {error}')\n"
    )
    done = in_a_process(limited, corpus, out, tokenizer_folder)
    assert done.stderr.startswith(f"told: {out / 'shard-00000.h5'}: the file is larger than"), done.stderr
    assert [path.name for path in out.iterdir()] == ["build.json"]
    assert content(build("full")) == content(build("undisturbed"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_disk_without_space_is_named_as_such(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    info = build()
    (info.folder / "shard-00001.h5").unlink()
    real = open
    monkeypatch.setattr(files, "open", lambda path, mode: real("/dev/full", mode), raising=False)
    with pytest.raises(DiskError, match="the disk is full"):
        build()


def test_a_shard_says_what_it_holds_in_a_form_that_can_be_mapped(build: Build) -> None:
    info = build()
    with h5py.File(info.folder / info.shards[0].name) as file:
        assert file["tokens"].dtype == np.uint16 and file["tokens"].chunks is None
        assert file["tokens"].id.get_offset() % 2 == 0
        assert file["doc_offsets"].dtype == np.int64 and file["doc_offsets"][-1] == len(file["tokens"])
        assert file["digests"].shape == (1, 16)
        assert file.attrs["tokenizer"] == info.tokenizer and file.attrs["shards"] == len(info.shards)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    text = (tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"id": 533,', '"id": 70000,'))
    info = build_store([corpus], tmp_path / "store", tmp_path)
    assert info is not None and info.dtype == "uint32"
    assert TokenStore(info).read(0, 10).dtype == np.uint32


def test_shards_are_cut_by_text_and_never_empty() -> None:
    sizes = np.array([3, 3, 3, 25, 1, 1, 9], np.int64)
    assert shard_bounds(sizes, 10) == (0, 4, 7)
    assert shard_bounds(sizes, 1000) == (0, 7)
    assert shard_bounds(sizes, 1) == tuple(range(8))


def test_nonsense_is_refused_before_anything_is_written(
    build: Build, tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    attempts: list[tuple[list[Path], Path, dict[str, Any]]] = [
        ([corpus], tokenizer_folder, {"shard_bytes": 0}),
        ([corpus], tokenizer_folder, {"seed": -1}),
        ([corpus], tmp_path / "no.json", {}),
        ([tmp_path / "no.jsonl"], tokenizer_folder, {}),
        ([], tokenizer_folder, {}),
    ]
    for inputs, tokenizer, settings in attempts:
        with pytest.raises(StoreError):
            build_store(inputs, tmp_path / "out", tokenizer, **settings)
    assert not list((tmp_path / "out").glob("*"))


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_tools_train_build_and_check(tmp_path: Path, corpus: Path) -> None:
    trained = tool("train_tokenizer", corpus, "--out", tmp_path / "tok", "--vocab-size", 512)
    assert "534 tokens" in trained.stdout, trained.stderr
    built = tool("build_store", corpus, "--out", tmp_path / "store", "--tokenizer", tmp_path / "tok")
    assert "120 documents, 1 shards" in built.stdout, built.stderr
    checked = tool("check_store", tmp_path / "store")
    assert "good" in checked.stdout and checked.returncode == 0, checked.stderr


def test_a_tool_tells_a_mistake_in_one_line_and_exits_2(tmp_path: Path) -> None:
    done = tool("check_store", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no token store at") and done.stderr.count("\n") == 1
