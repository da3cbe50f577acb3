"""The audit: a good store passes, and each kind of fault is found by the finding that it belongs to."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crystal_hpc import files
from crystal_hpc.data import repeats
from crystal_hpc.data.audit import Finding, audit
from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.catalog import StoreInfo, digest_of, read_store_info
from crystal_hpc.data.shard import Documents, Tokens, read_documents, write_shard
from crystal_hpc.data.store import TokenStore
from crystal_hpc.errors import StoreError
from tests.data.conftest import make_text, write_jsonl

Change = Callable[[Documents, Tokens], tuple[Documents, Tokens]]


@pytest.fixture
def store(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> Path:
    """A good store of six shards."""
    info = build_store([corpus], tmp_path / "store", tokenizer_folder, Options(shard_tokens=3900))
    assert info is not None and len(info.shards) == 6
    return info.folder


def bad(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.said for finding in findings if finding.verdict == "bad"}


def rewrite(folder: Path, number: int, change: Change) -> None:
    """Writes a shard anew with other content, and store.json to match it, as a faulty build would have."""
    info = read_store_info(folder)
    path = folder / info.shards[number].name
    start = sum(shard.tokens for shard in info.shards[:number])
    tokens = TokenStore(info).read(start, info.shards[number].tokens).copy()
    shard = write_shard(path, *change(read_documents(path), tokens), {})
    shards = (*info.shards[:number], shard, *info.shards[number + 1 :])
    totals = {name: sum(getattr(s, name) for s in shards) for name in ("documents", "tokens")}
    digest = digest_of(s.digest for s in shards)
    files.write_json(folder / "store.json", replace(info, shards=shards, digest=digest, **totals).as_json())


def test_a_good_store_passes(store: Path, tokenizer_folder: Path) -> None:
    findings = audit([store], tokenizer_folder)
    assert bad(findings) == {} and len(findings) == 10
    said = {finding.name: finding.said for finding in findings}
    assert said["in and out"].startswith("120 records = 120 here + 0 held out + 0 ids seen before + 0 rejected")
    assert said["texts"] == "120 documents decode to exactly the texts that they were made of"
    assert said["special tokens"] == "<s> 120, </s> 120"


@pytest.mark.parametrize("name", ["tokens", "digests", "doc_offsets", "doc_hashes", "superblock", "cut", "gone"])
def test_damage_of_any_structure_is_found_and_all_damaged_shards_are_named(store: Path, name: str) -> None:
    import h5py

    info = read_store_info(store)
    for number in (1, 4):
        path = store / info.shards[number].name
        if name in ("cut", "gone"):
            os.truncate(path, 5000) if name == "cut" else path.unlink()
            continue
        with h5py.File(path) as file:
            place = 20 if name == "superblock" else int(file[name].id.get_offset()) + 1
        with open(path, "r+b") as raw:
            raw.seek(place)
            byte = raw.read(1)[0]
            raw.seek(place)
            raw.write(bytes([byte ^ 16]))
    if name in ("cut", "gone"):
        with pytest.raises(StoreError, match=r"shard-00001.h5: (5000 bytes, but|the shard is missing)"):
            audit([store])
        return
    said = bad(audit([store]))
    assert said.keys() == {"bytes"} and said["bytes"].startswith("2 of 6 shards are damaged")
    assert "shard-00001.h5" in said["bytes"] and "shard-00004.h5" in said["bytes"]


def lose_bos(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
    tokens[documents.offsets[3]] = 7
    return documents, tokens


def add_eos_inside(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
    tokens[documents.offsets[3] + 2] = 2
    return documents, tokens


def exceed_the_vocabulary(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
    tokens[documents.offsets[3] + 2] = 60_000
    return documents, tokens


def exchange_two(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
    hashes = documents.hashes.copy()
    hashes[[3, 4]] = hashes[[4, 3]]
    return replace(documents, hashes=hashes), tokens


def repeat_a_text(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
    hashes = documents.hashes.copy()
    hashes[3:9] = hashes[3]
    return replace(documents, hashes=hashes), tokens


def repeat_an_id(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
    ids = documents.id_hashes.copy()
    ids[2:5] = 9
    return replace(documents, id_hashes=ids), tokens


@pytest.mark.parametrize(
    ("change", "finding", "said"),
    [
        (lose_bos, "ends", r"1 documents lack BOS \(1\), the first is document \d+"),
        (add_eos_inside, "ends", "EOS stands 121 times in 120 documents"),
        (exceed_the_vocabulary, "ids", "the largest is 60000, and the tokenizer has 534"),
        (exchange_two, "order", r"document \d+ stands before one whose shuffle key is smaller"),
        (repeat_a_text, "duplicates", r"5 of 120 documents repeat a text \(4.17%"),
        (repeat_an_id, "duplicates", "2 documents repeat an id"),
    ],
)
def test_a_store_that_was_built_wrongly_is_found_out(store: Path, change: Change, finding: str, said: str) -> None:
    rewrite(store, 2, change)
    found = bad(audit([store]))
    assert list(found) == [finding]
    assert re.search(said, found[finding])


def test_lost_documents_and_tokens_are_found_by_what_went_in(store: Path) -> None:
    def drop_the_last(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
        kept = Documents(
            documents.offsets[:-1], documents.hashes[:-1], documents.id_hashes[:-1], documents.info_offsets[:-1],
            documents.info[: documents.info_offsets[-2]],
        )  # fmt: skip
        return kept, tokens[: documents.offsets[-2]]

    rewrite(store, 1, drop_the_last)
    said = bad(audit([store]))
    assert said == {"in and out": "120 records went in, 120 of them usable, but 119 here + 0 held out + 0 ids seen "
                    "before + 0 rejected"}  # fmt: skip


def test_totals_that_do_not_add_up_are_found(store: Path) -> None:
    path = store / "build.json"
    plan = json.loads(path.read_text())
    plan["accounts"]["tokens"] += 1
    path.write_text(json.dumps(plan))
    assert "tokens were encoded, but" in bad(audit([store]))["in and out"]
    path.unlink()
    (finding,) = [finding for finding in audit([store]) if finding.name == "in and out"]
    assert finding.verdict == "note" and "no account of what went in" in finding.said


def test_texts_that_do_not_come_back_are_found(store: Path, tokenizer_folder: Path) -> None:
    def other_words(documents: Documents, tokens: Tokens) -> tuple[Documents, Tokens]:
        for start in documents.offsets[:5]:
            tokens[start + 1] = 100 if tokens[start + 1] != 100 else 101
        return documents, tokens

    rewrite(store, 0, other_words)
    assert bad(audit([store], tokenizer_folder))["texts"].startswith("5 of 120 documents do not decode to their texts")


def test_another_tokenizer_is_told(store: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    text = (tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("fim_pad", "fim_pod"), encoding="utf-8")
    assert "the store was made with tokenizer" in bad(audit([store], tmp_path))["tokenizer"]


@pytest.fixture
def build(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., StoreInfo]:
    def make(name: str, numbers: range, **options: Any) -> StoreInfo:
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", map(make_text, numbers))
        info = build_store([corpus], tmp_path / name, tokenizer_folder, Options(**options))
        assert info is not None
        return info

    return make


@pytest.mark.parametrize("seed", [1, 2])
def test_documents_in_two_stores_are_found_whatever_their_seeds(
    build: Callable[..., StoreInfo], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "AT_A_TIME", 9)
    one, two, three = build("one", range(50)), build("two", range(45, 80), seed=seed), build("three", range(200, 210))
    stores = [TokenStore(info) for info in (one, two, three)]
    assert repeats.shared_documents(stores) == {(0, 1): 5, (0, 2): 0, (1, 2): 0}
    findings = audit([one.folder, three.folder], held_out=[two.folder])
    assert bad(findings) == {"held out": "5 documents are in both one and two: they would be trained on"}
    assert bad(audit([one.folder, two.folder])) == {}  # two training stores may share texts; it is told


def test_a_store_and_its_held_out_part_have_nothing_in_common(build: Callable[..., StoreInfo]) -> None:
    info = build("parted", range(100), held_out=0.3)
    findings = audit([info.folder], held_out=[info.folder.with_name("parted-held-out")])
    assert bad(findings) == {}
    assert any("have no document in common" in finding.said for finding in findings)


def test_runs_of_equal_texts_are_counted_across_shards(tmp_path: Path, tokenizer_folder: Path) -> None:
    corpus = write_jsonl(tmp_path / "many.jsonl", [make_text(1)] * 7 + [make_text(2)] * 4 + [make_text(3)])
    info = build_store([corpus], tmp_path / "many", tokenizer_folder)
    assert info is not None
    whole = bad(audit([info.folder]))["duplicates"]
    assert whole.startswith("9 of 12 documents repeat a text (75.00%") and "\n7 times: document" in whole
    assert bad(audit([info.folder], most_duplicates=0.75)) == {}


def test_a_folder_that_is_no_store_is_one_line(tmp_path: Path, store: Path) -> None:
    with pytest.raises(StoreError, match="no token store at"):
        audit([tmp_path / "nowhere"])
    shutil.rmtree(store)
    with pytest.raises(StoreError, match="no token store at"):
        audit([store])


def test_a_histogram_tells_how_long_documents_are(store: Path) -> None:
    (finding,) = [finding for finding in audit([store]) if finding.name == "lengths"]
    first, *bars = finding.said.splitlines()
    lengths = np.concatenate([np.diff(TokenStore.open(store).documents(n).offsets) for n in range(6)])
    assert f"the longest is document {lengths.argmax()} with {lengths.max()}" in first
    assert sum(int(bar.split(":")[1].split()[0]) for bar in bars) == 120
