"""Building a store: the same bytes whoever built it and however often it was killed, and never one not asked for."""

import json
import os
import random
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
from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.catalog import StoreInfo, read_store_info
from crystal_hpc.data.shard import shuffle_keys
from crystal_hpc.data.store import TokenStore
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import DiskError, StoreError

REPOSITORY = Path(__file__).parents[2]
SHARD = 4000  # tokens: the corpus makes several shards
Build = Callable[..., StoreInfo]


@pytest.fixture(scope="module")
def corpus_files(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[Path]:
    """The test corpus in seven files, each of its own size, with ids, and a few bad lines."""
    folder, found = tmp_path_factory.mktemp("files"), []
    for number, start in enumerate(range(0, 120, 18)):
        lines = [json.dumps({"text": text, "id": f"d{start + i}"}) for i, text in enumerate(texts[start : start + 18])]
        found.append(folder / f"{number}.jsonl")
        found[-1].write_text("\n".join([*lines, "{", ""][: 20 if number == 3 else 18]) + "\n", encoding="utf-8")
    return found


@pytest.fixture
def build(tmp_path: Path, corpus_files: list[Path], tokenizer_folder: Path) -> Build:
    """Builds a store of the test corpus in tmp_path/<folder>/store and returns its info."""

    def run(folder: str = "a", inputs: list[Path] | None = None, fresh: bool = False, **options: Any) -> StoreInfo:
        chosen = Options(**({"shard_tokens": SHARD, "most_rejected": 0.1} | options))
        info = build_store(inputs or corpus_files, tmp_path / folder / "store", tokenizer_folder, chosen, fresh=fresh)
        assert info is not None
        return info

    return run


def content(info_or_folder: StoreInfo | Path) -> dict[str, bytes]:
    """Every file of a store but the plan, which holds the times of the inputs."""
    folder = info_or_folder if isinstance(info_or_folder, Path) else info_or_folder.folder
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "build.json"}


def command(out: Path, tokenizer: Path, inputs: list[Path], *more: object) -> list[str]:
    words = [REPOSITORY / "tools" / "build_store.py", *inputs, "--tokenizer", tokenizer, "--out", out]
    return [
        sys.executable,
        "-W",
        "error",
        *map(str, words),
        "--shard-tokens",
        str(SHARD),
        "--most-rejected",
        "0.1",
        *map(str, more),
    ]


def environment(**variables: object) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY)} | {name: str(value) for name, value in variables.items()}


def in_a_process(program: str, out: Path, tokenizer: Path, inputs: list[Path]) -> subprocess.CompletedProcess[str]:
    """Runs a program that gets `build()`, which builds what sys.argv names."""
    head = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom crystal_hpc.data.build import Options, build_store\n"
        "def build():\n    out, tokenizer, *inputs = map(Path, sys.argv[1:])\n"
        f"    return build_store(inputs, out, tokenizer, Options(shard_tokens={SHARD}, most_rejected=0.1))\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", head + program, *map(str, (out, tokenizer, *inputs))],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_store_holds_every_document_once_with_its_ends_names_and_hash(
    build: Build, texts: list[str], tokenizer_folder: Path
) -> None:
    store, tokenizer = TokenStore(build()), Tokenizer.load(tokenizer_folder)
    found = {}
    for number in range(len(store.info.shards)):
        documents = store.documents(number)
        for place in range(len(documents)):
            said = documents.info[documents.info_offsets[place] : documents.info_offsets[place + 1]].tobytes()
            found[json.loads(said)["id"]] = store.document(len(found)).tolist()
    assert found == {f"d{number}": [1, *tokenizer.encode(text), 2] for number, text in enumerate(texts)}
    assert store.tokens == sum(map(len, found.values()))


def test_documents_stand_in_the_order_of_their_keys(build: Build) -> None:
    for seed in (1, 2**64 - 1):
        store = TokenStore(build(f"seed{seed}", seed=seed))
        hashes = np.concatenate([store.documents(number).hashes for number in range(len(store.info.shards))])
        keys = list(map(tuple, shuffle_keys(hashes, seed).tolist()))
        assert keys == sorted(keys) and len(set(keys)) == 120


def test_without_bos_and_eos_a_document_is_its_tokens(build: Build, texts: list[str], tokenizer_folder: Path) -> None:
    info = build(bos=False, eos=False)
    assert Tokenizer.load(tokenizer_folder).decode(TokenStore(info).document(0)) in texts
    assert (info.bos, info.eos) == (None, None)


def test_shards_have_the_size_asked_for_to_within_a_document(build: Build) -> None:
    info = build()
    longest = max(info.tokens // 30, 500)
    assert len(info.shards) > 4 and all(abs(shard.tokens - SHARD) < longest for shard in info.shards[:-1])
    assert len(build("tiny", shard_tokens=1).shards) == 120
    assert len(build("huge", shard_tokens=10**12).shards) == 1


def test_the_order_and_number_of_input_files_do_not_matter(
    build: Build, corpus_files: list[Path], tmp_path: Path
) -> None:
    expected = content(build("one"))
    assert content(build("reversed", corpus_files[::-1])) == expected
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(b"".join(path.read_bytes() for path in corpus_files[::-1]))
    moved = content(build("whole", [whole]))
    assert moved.pop("rejected.jsonl") != expected.pop("rejected.jsonl")  # which names files
    assert moved == expected


def test_both_engines_give_the_same_bytes_and_the_build_says_which_it_was(build: Build) -> None:
    assert content(build("any")) == content(build("reference", engine="tokenizers"))
    said = json.loads((build("any").folder / "build.json").read_text())["engine"]
    assert said["engine"].startswith("tokenizers") and said["reason"].startswith("gigatoken cannot")


def test_parts_of_any_size_give_the_same_bytes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(build("whole"))
    monkeypatch.setattr("crystal_hpc.data.parts.PART_TOKENS", 300)
    monkeypatch.setattr("crystal_hpc.data.parts.BATCH_CHARACTERS", 500)
    monkeypatch.setattr("crystal_hpc.data.build.UNIT_BYTES", (1000, 1000))
    monkeypatch.setattr("crystal_hpc.data.division.IDS_AT_A_TIME", 7)
    assert content(build("small")) == expected


@pytest.mark.parametrize(("launcher", "count"), [("mpiexec", 2), ("array", 3), ("nothing", 5)])
def test_any_number_of_processes_build_the_same_bytes(
    build: Build, tmp_path: Path, corpus_files: list[Path], tokenizer_folder: Path, launcher: str, count: int
) -> None:
    out = tmp_path / "shared" / "store"
    variables: list[dict[str, object]] = {
        "mpiexec": [{"PMI_RANK": rank, "PMI_SIZE": count} for rank in range(count)],
        "array": [{"SLURM_ARRAY_TASK_ID": 7 + 2 * n, "SLURM_ARRAY_TASK_COUNT": count, "SLURM_ARRAY_TASK_MIN": 7,
                   "SLURM_ARRAY_TASK_STEP": 2} for n in range(count)],
        "nothing": [{} for _ in range(count)],
    }[launcher]  # fmt: skip
    words = command(out, tokenizer_folder, corpus_files, "--workers", 1)
    started = [
        subprocess.Popen(words, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for more in variables
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    assert sum("120 documents" in out for out, _ in said) == (count if launcher == "nothing" else 1)
    assert content(out) == content(build("alone")) and not (out / "parts").exists()


def test_ranks_under_mpiexec_build_the_same_bytes(
    build: Build, tmp_path: Path, corpus_files: list[Path], tokenizer_folder: Path
) -> None:
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("the mpich wheel is not installed in this environment")
    out = tmp_path / "ranks" / "store"
    words = [str(mpiexec), "-n", "3", *command(out, tokenizer_folder, corpus_files)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("120 documents") == 1, done.stderr
    assert content(out) == content(build("alone"))
    refused = subprocess.run([*words, "--fresh"], env=environment(), capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--fresh is for one process, and 3 were started" in refused.stderr


def test_helpers_on_other_cores_take_part(
    build: Build, tmp_path: Path, corpus_files: list[Path], tokenizer_folder: Path
) -> None:
    out = tmp_path / "helped" / "store"
    info = build_store(corpus_files, out, tokenizer_folder, Options(shard_tokens=SHARD, most_rejected=0.1), workers=3)
    assert info is not None and content(info) == content(build("alone"))


# Counts every system call by which the disk changes, and dies at one of them.
DYING = f"""
sys.path.append({str(REPOSITORY / "tests")!r})
from dying import die_at
count = die_at(int(os.environ["MOMENT"]))
build()
print(count())
"""


def test_a_build_killed_at_ten_random_moments_leaves_no_trace_of_it(
    build: Build, tmp_path: Path, corpus_files: list[Path], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOMENT", "0")
    whole = in_a_process(DYING, tmp_path / "counted", tokenizer_folder, corpus_files)
    moments, out = int(whole.stdout), tmp_path / "killed"
    assert moments > 60
    chance = random.Random(4)
    for kill in range(10):
        left = max(2, moments - 6 * kill)  # less is left to do each time
        monkeypatch.setenv("MOMENT", str(chance.randint(1, left // 2)))
        done = in_a_process(DYING, out, tokenizer_folder, corpus_files)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        if done.returncode == 0:  # finished before it could die: begin again, and die late
            files.remove_folder(out)
            monkeypatch.setenv("MOMENT", str(moments - chance.randint(0, 5)))
            done = in_a_process(DYING, out, tokenizer_folder, corpus_files)
            assert done.returncode == -signal.SIGKILL
        elif not (out / "store.json").exists():
            with pytest.raises(StoreError, match="half-written|not a token store|no token store"):
                read_store_info(out)
    info = build_store(
        corpus_files, out, tokenizer_folder, Options(shard_tokens=SHARD, most_rejected=0.1, name="store")
    )
    assert info is not None
    undisturbed = content(build("undisturbed"))
    found = content(out)
    for both in (undisturbed, found):  # the names of the folders differ
        both["store.json"] = both["store.json"].replace(b'"killed"', b'"store"')
    assert found == undisturbed


def test_a_killed_unit_goes_on_behind_its_finished_parts(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crystal_hpc.data.parts.PART_TOKENS", 2000)
    monkeypatch.setattr("crystal_hpc.data.parts.BATCH_CHARACTERS", 1000)
    out, asked = tmp_path / "store", 0

    def stop_late() -> bool:
        nonlocal asked
        asked += 1
        return asked > 60

    assert build_store([corpus], out, tokenizer_folder, should_stop=stop_late) is None
    before = {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("*.h5")}
    assert len(before) > 2
    encoded: list[int] = []
    real = Tokenizer.encode_flat
    monkeypatch.setattr(Tokenizer, "encode_flat", lambda self, texts, **more: (
        encoded.append(len(texts)), real(self, texts, **more))[1])  # fmt: skip
    monkeypatch.setattr("crystal_hpc.data.worker.remove_folder", lambda _: None)
    info = build_store([corpus], out, tokenizer_folder)
    assert info is not None and info.documents == 120
    assert sum(encoded) < 120
    after = {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("*.h5")}
    assert before.items() <= after.items()


def test_a_stop_is_clean_and_the_next_run_goes_on(
    build: Build, tmp_path: Path, corpus_files: list[Path], tokenizer_folder: Path
) -> None:
    out = tmp_path / "stopped" / "store"
    asked = iter([False] * 9 + [True])
    options = Options(shard_tokens=SHARD, most_rejected=0.1)
    assert build_store(corpus_files, out, tokenizer_folder, options, should_stop=lambda: next(asked, False)) is None
    assert not (out / "store.json").exists() and list((out / "parts").glob("*.h5"))
    assert not list(out.rglob("*.pending"))
    assert build_store(corpus_files, out, tokenizer_folder, options) is not None
    assert content(out) == content(build("undisturbed"))


def test_a_finished_store_is_not_touched_by_a_rerun(build: Build) -> None:
    info = build()
    before = {path.name: path.stat().st_mtime_ns for path in info.folder.iterdir()}
    assert build() == info
    assert {path.name: path.stat().st_mtime_ns for path in info.folder.iterdir()} == before


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
        ({"shard_tokens": 5000}, "shard size 4000, not 5000"),
        ({"held_out": 0.2}, "held-out share 0.0, not 0.2"),
        ({"longest": 10**6}, "longest document 4294967296, not 1000000"),
    ],
)
def test_a_rerun_with_other_settings_is_refused(build: Build, change: dict[str, Any], said: str) -> None:
    before = content(build())
    with pytest.raises(StoreError, match=f"{said}; choose another folder, or build afresh"):
        build(**change)
    assert content(build()) == before
    assert content(build(fresh=True, **change)) == content(build("other", **change))


def test_a_rerun_with_another_corpus_or_tokenizer_is_refused(
    build: Build, corpus_files: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    info = build()
    with pytest.raises(StoreError, match=r"store, perhaps unfinished, with other corpus files \(.*0.jsonl\); choose"):
        build(inputs=corpus_files[1:])
    other = tmp_path / "tokenizer.json"
    other.write_text((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8").replace("fim_pad", "fim_pod"))
    with pytest.raises(StoreError, match=rf"tokenizer {info.tokenizer}, not \w+; choose"):
        build_store(corpus_files, info.folder, other, Options(shard_tokens=SHARD, most_rejected=0.1))


def test_building_afresh_deletes_the_store_and_nothing_else(build: Build) -> None:
    info = build(shard_tokens=2000)
    (info.folder / "notes.txt").write_text("mine")
    assert len(build(shard_tokens=12_000, fresh=True).shards) == 2
    assert (info.folder / "notes.txt").read_text() == "mine" and len(list(info.folder.glob("shard-*"))) == 2


def test_a_plan_that_is_missing_or_broken_is_refused(build: Build) -> None:
    info = build()
    (info.folder / "build.json").write_text("{")
    with pytest.raises(StoreError, match="not a build plan"):
        build()
    (info.folder / "build.json").unlink()
    with pytest.raises(StoreError, match="holds a store, or shards of one, that is not of this build"):
        build()


def test_a_disk_without_space_is_named_as_such(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    info = build()
    (info.folder / "shard-00001.h5").unlink()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crystal_hpc.data.shard.os.pwrite", full)
    with pytest.raises(DiskError, match="the disk is full; free some space"):
        build()
    monkeypatch.undo()
    assert not list(info.folder.rglob("*.pending"))


def test_a_shard_says_what_it_holds_in_a_form_that_can_be_mapped(build: Build) -> None:
    info = build()
    with h5py.File(info.folder / info.shards[0].name) as file:
        assert file["tokens"].dtype == np.uint16 and file["tokens"].chunks is None
        assert file["tokens"].id.get_offset() == info.shards[0].tokens_at and info.shards[0].tokens_at % 4096 == 0
        assert file["doc_offsets"].dtype == np.int64 and file["doc_offsets"][-1] == len(file["tokens"])
        assert file["digests"].shape == (1, 16)
        assert file.attrs["tokenizer"] == info.tokenizer and file.attrs["shards"] == len(info.shards)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    text = (tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"id": 533,', '"id": 70000,'))
    info = build_store([corpus], tmp_path / "store", tmp_path)
    assert info is not None and info.dtype == "uint32"
    assert TokenStore(info).read(0, 10).dtype == np.uint32
