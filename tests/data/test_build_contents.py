"""What a build leaves out, holds out and puts up with; and its tools."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.catalog import StoreInfo, read_store_info
from crystal_hpc.data.parts import text_pieces
from crystal_hpc.data.store import TokenStore
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import StoreError
from tests.data.conftest import make_text

REPOSITORY = Path(__file__).parents[2]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records as JSON Lines."""

    def write(records: list[Any], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


def built(inputs: list[Path], out: Path, tokenizer: Path, **options: Any) -> StoreInfo:
    info = build_store(inputs, out, tokenizer, Options(**options))
    assert info is not None
    return info


def accounts(info: StoreInfo) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((info.folder / "build.json").read_text())["accounts"]
    return found


def infos(info: StoreInfo) -> list[dict[str, str]]:
    store, found = TokenStore(info), []
    for number in range(len(info.shards)):
        documents = store.documents(number)
        for start, stop in zip(documents.info_offsets[:-1], documents.info_offsets[1:], strict=True):
            found.append(json.loads(documents.info[start:stop].tobytes() or b"{}"))
    return found


def test_of_documents_with_one_id_one_stays_the_same_whatever_the_order(
    write: Write, tmp_path: Path, tokenizer_folder: Path
) -> None:
    records = [{"text": make_text(n), "id": f"d{n % 10}", "path": str(n)} for n in range(12)]
    records += [{"text": make_text(3), "id": "d3", "path": path} for path in ("z", "a")]  # text, id: only paths differ
    one = built([write(records)], tmp_path / "one", tokenizer_folder, most_rejected=0.5, name="s")
    two = built([write(records[::-1], "b.jsonl")], tmp_path / "two", tokenizer_folder, most_rejected=0.5, name="s")
    assert one.documents == 10 and one.rejected == {"id seen before": 4}
    assert {said["id"] for said in infos(one)} == {f"d{n}" for n in range(10)}
    assert next(said for said in infos(one) if said["id"] == "d3")["path"] == "3"  # the first in order of bytes
    for name in ("store.json", "shard-00000.h5", "rejected.jsonl"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    account = accounts(one)
    assert (account["records"], account["documents"], account["duplicate_ids"]["documents"]) == (14, 14, 4)
    assert account["tokens"] == one.tokens + account["duplicate_ids"]["tokens"]


def test_too_many_repeated_ids_fail_the_build(write: Write, tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write([{"text": make_text(n), "id": "same"} for n in range(50)])
    with pytest.raises(StoreError, match="49 of 50 records hold no usable document.*49 id seen before") as caught:
        built([path], tmp_path / "store", tokenizer_folder)
    assert "\n" not in str(caught.value)
    shown = [json.loads(line) for line in (tmp_path / "store" / "rejected.jsonl").read_text().splitlines()]
    assert len(shown) == 20 and all(line["records"] == 49 and '"id":"same"' in line["sample"] for line in shown)
    # Putting up with it, the same build goes on from its parts.
    assert built([path], tmp_path / "store", tokenizer_folder, most_rejected=1.0).documents == 1


def test_equal_texts_stay_and_stand_side_by_side(write: Write, tmp_path: Path, tokenizer_folder: Path) -> None:
    info = built([write([{"text": make_text(n % 5)} for n in range(20)])], tmp_path / "store", tokenizer_folder)
    hashes = TokenStore(info).documents(0).hashes
    assert info.documents == 20 and all((hashes[n : n + 4] == hashes[n]).all() for n in range(0, 20, 4))


def test_rejected_records_are_counted_shown_and_do_not_get_lost(
    write: Write, tmp_path: Path, tokenizer_folder: Path
) -> None:
    good = [{"text": make_text(n)} for n in range(6)]
    bad = [{"text": "\ud800"}, {"text": "a\0b"}, {"text": "  \n"}, {"words": "x"}, [1], {"text": 7}]
    path = write(good + bad)
    with open(path, "ab") as file:
        file.write(b"\n{\n\xff\xfe\n")
    info = built([path], tmp_path / "store", tokenizer_folder, most_rejected=0.6)
    assert read_store_info(info.folder).rejected == {
        "NUL character": 1, "blank line": 1, "empty text": 1, "lone surrogate": 1, "no text": 1, "not JSON": 1,
        "not UTF-8": 1, "not a JSON object": 1, "text is not a string": 1,
    }  # fmt: skip
    account = accounts(info)
    assert account["records"] == account["documents"] + sum(account["rejected"].values()) == 15
    shown = [json.loads(line) for line in (info.folder / "rejected.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in shown} == set(info.rejected) - {"blank line"}
    assert all(line["path"] == str(path) and line["at"].startswith("byte ") for line in shown)


def test_above_the_stated_rate_a_build_fails_in_one_line(write: Write, tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write([{"text": make_text(n)} for n in range(8)] + ["no", "no"])
    with pytest.raises(StoreError, match=r"2 of 10 records hold no usable document, more than the 10.00% allowed") as e:
        built([path], tmp_path / "store", tokenizer_folder, most_rejected=0.1)
    assert "\n" not in str(e.value) and not (tmp_path / "store" / "store.json").exists()
    assert built([path], tmp_path / "store", tokenizer_folder, most_rejected=0.2).documents == 8


def test_a_corpus_without_documents_is_told(write: Write, tmp_path: Path, tokenizer_folder: Path) -> None:
    for records, share in (([], 0.0), ([{"text": ""}], 1.0)):
        with pytest.raises(StoreError, match="the corpus is empty"):
            built([write(records)], tmp_path / f"store{share}", tokenizer_folder, most_rejected=share)


def test_held_out_documents_go_into_a_store_of_their_own_and_stay_there_as_the_corpus_grows(
    write: Write, tmp_path: Path, tokenizer_folder: Path
) -> None:
    records = [{"text": make_text(n), "id": str(n)} for n in range(100)]
    less = built([write(records[:60])], tmp_path / "less", tokenizer_folder, held_out=0.2)
    more = built([write(records, "more.jsonl")], tmp_path / "more", tokenizer_folder, held_out=0.2, shard_tokens=900)
    sides = {}
    for info in (less, more):
        beside = read_store_info(info.folder.with_name(info.folder.name + "-held-out"))
        sides[info.name] = {s["id"] for s in infos(info)}, {s["id"] for s in infos(beside)}
        assert (
            beside.name == f"{info.name}-held-out"
            and 0.05 < beside.documents / (info.documents + beside.documents) < 0.4
        )
        account = accounts(info)
        assert account["held_out"] == {"documents": beside.documents, "tokens": beside.tokens}
        assert account["tokens"] == info.tokens + beside.tokens
    assert not sides["more"][0] & sides["more"][1] and len(sides["more"][0] | sides["more"][1]) == 100
    assert sides["less"][1] <= sides["more"][1]


def test_what_an_earlier_build_left_is_not_taken_for_this_ones(
    write: Write, tmp_path: Path, tokenizer_folder: Path
) -> None:
    records = [{"text": make_text(n)} for n in range(60)]
    out, beside = tmp_path / "store", tmp_path / "store-held-out"
    built([write(records)], out, tokenizer_folder, held_out=0.3)
    shutil.rmtree(out)  # but not the other
    other = write(records[30:], "other.jsonl")
    with pytest.raises(StoreError, match="store-held-out: holds a store, or shards of one, that is not of this build"):
        built([other], out, tokenizer_folder, held_out=0.3)
    shutil.rmtree(beside)
    built([other], beside, tokenizer_folder)  # a store of its own under that name
    before = {path.name: path.read_bytes() for path in beside.iterdir()}
    with pytest.raises(StoreError, match="store-held-out: holds a store"):
        built([other], out, tokenizer_folder, held_out=0.3)
    assert {path.name: path.read_bytes() for path in beside.iterdir()} == before


def test_a_held_out_store_that_is_lost_is_built_again(write: Write, tmp_path: Path, tokenizer_folder: Path) -> None:
    path, out = write([{"text": make_text(n)} for n in range(60)]), tmp_path / "store"
    built([path], out, tokenizer_folder, held_out=0.3)
    beside = tmp_path / "store-held-out"
    before = {path.name: path.read_bytes() for path in beside.iterdir()}
    shutil.rmtree(beside)
    built([path], out, tokenizer_folder, held_out=0.3)
    assert {path.name: path.read_bytes() for path in beside.iterdir()} == before


def test_one_text_repeated_past_a_shard_is_one_shard(write: Write, tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write([{"text": make_text(1)}] * 30)
    info = built([path], tmp_path / "store", tokenizer_folder, shard_tokens=20)
    assert info.documents == 30 and len(info.shards) == 1


def test_links_to_text_files_give_the_same_store_with_any_number_of_workers(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "real").mkdir()
    links = []
    for number in range(6):
        (tmp_path / "real" / f"blob{number}").write_text(make_text(number), encoding="utf-8")
        links.append(tmp_path / f"name{number}.txt")
        links[-1].symlink_to(tmp_path / "real" / f"blob{number}")
    digests = set()
    for workers in (1, 3):
        options = Options(format="text", name="s")
        info = build_store(links, tmp_path / f"s{workers}", tokenizer_folder, options, workers=workers)
        assert info is not None and {said["path"] for said in infos(info)} == {f"name{n}.txt" for n in range(6)}
        digests.add(info.digest)
    assert len(digests) == 1


def test_text_files_of_the_same_name_in_two_folders_are_two_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.txt").write_text(make_text(number), encoding="utf-8")
    assert built([tmp_path / "a", tmp_path / "b"], tmp_path / "s", tokenizer_folder).documents == 2


def test_a_refused_engine_is_refused_for_the_later_pieces_of_long_texts_too(crystal_tokenizer: Path) -> None:
    tokenizer = Tokenizer.load(crystal_tokenizer)
    assert tokenizer._engine(True).name.startswith("gigatoken")
    tokenizer.choose_engine("tokenizers")
    assert tokenizer._engine(True).name.startswith("tokenizers")


def test_very_long_texts_are_encoded_in_pieces_that_make_no_difference(
    write: Write, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["".join(make_text(n) for n in range(start, start + 20)) for start in (0, 20)] + [
        "x" * 5000,
        " " * 3000 + "y",
    ]
    path = write([{"text": text} for text in texts])
    whole = built([path], tmp_path / "whole", tokenizer_folder, name="s")
    monkeypatch.setattr("crystal_hpc.data.parts.PIECE_CHARACTERS", 100)
    assert all(len(list(text_pieces(text))) > 20 for text in texts[:2])
    assert all("".join(text_pieces(text)) == text for text in texts)
    pieces = built([path], tmp_path / "pieces", tokenizer_folder, name="s")
    assert pieces.digest == whole.digest


def test_crystals_tokenizer_is_encoded_by_gigatoken_to_the_same_bytes(
    write: Write, tmp_path: Path, crystal_tokenizer: Path
) -> None:
    path = write([{"text": make_text(n)} for n in range(200)])
    quick = built([path], tmp_path / "quick", crystal_tokenizer, name="s")
    slow = built([path], tmp_path / "slow", crystal_tokenizer, name="s", engine="tokenizers")
    said = json.loads((quick.folder / "build.json").read_text())["engine"]
    assert said["engine"].startswith("gigatoken") and said["reason"].startswith("identical to tokenizers")
    assert said["texts"] > 200 and quick.digest == slow.digest
    text = Tokenizer.load(crystal_tokenizer).decode(TokenStore(quick).document(0)[1:-1])
    assert text in {make_text(n) for n in range(200)} or "▁" in text


def test_every_format_gives_the_same_store(tmp_path: Path, texts: list[str], tokenizer_folder: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    lines = "".join(json.dumps({"body": text, "n": n}) + "\n" for n, text in enumerate(texts)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"body": texts, "n": list(range(120))}), tmp_path / "a.parquet", row_group_size=30)
    from crystal_hpc.data.corpus import Fields

    fields = Fields(text="body", id="n")
    stores = {
        built([path], tmp_path / f"store-{path.name}", tokenizer_folder, fields=fields, name="s").digest
        for path in sorted(tmp_path.glob("a.*"))
    }
    assert len(stores) == 1


def test_nonsense_is_refused_before_anything_is_written(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    attempts: list[tuple[list[Path], Path, dict[str, Any]]] = [
        ([corpus], tokenizer_folder, {"shard_tokens": 0}),
        ([corpus], tokenizer_folder, {"seed": -1}),
        ([corpus], tokenizer_folder, {"held_out": 1.0}),
        ([corpus], tokenizer_folder, {"held_out": 1e-6}),
        ([corpus], tokenizer_folder, {"most_rejected": -1}),
        ([tmp_path], tokenizer_folder, {}),  # the store would lie in its own corpus
        ([corpus], tmp_path / "no.json", {}),
        ([tmp_path / "no.jsonl"], tokenizer_folder, {}),
        ([], tokenizer_folder, {}),
    ]
    for inputs, tokenizer, options in attempts:
        with pytest.raises(StoreError):
            build_store(inputs, tmp_path / "out", tokenizer, Options(**options))
    assert not (tmp_path / "out").exists()


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_tools_train_build_and_check(tmp_path: Path, corpus: Path) -> None:
    trained = tool("train_tokenizer", corpus, "--out", tmp_path / "tok", "--vocab-size", 512)
    assert "534 tokens" in trained.stdout, trained.stderr
    made = tool("build_store", corpus, "--out", tmp_path / "store", "--tokenizer", tmp_path / "tok")
    assert "120 documents" in made.stdout and "1 shards" in made.stdout, made.stderr
    checked = tool("check_store", tmp_path / "store")
    assert "good" in checked.stdout and checked.returncode == 0, checked.stderr
    audited = tool("audit_store", tmp_path / "store", "--tokenizer", tmp_path / "tok")
    assert audited.stdout.rstrip().endswith("0 bad") and audited.returncode == 0, audited.stderr
    shown = tool("show_store", tmp_path / "store", "--tokenizer", tmp_path / "tok", "--document", 0)
    assert shown.stdout.startswith("document 0, hash ") and shown.returncode == 0, shown.stderr


def test_a_tool_tells_a_mistake_in_one_line_and_exits_2(tmp_path: Path) -> None:
    done = tool("check_store", tmp_path / "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: no token store at")
    done = tool("build_store", tmp_path / "no.jsonl", "--out", tmp_path / "out", "--tokenizer", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


def test_hash_columns_are_of_the_text_and_the_id(write: Write, tmp_path: Path, tokenizer_folder: Path) -> None:
    import xxhash

    info = built([write([{"text": "Hello world", "id": 7}, {"text": "no id"}])], tmp_path / "s", tokenizer_folder)
    documents = TokenStore(info).documents(0)
    of = {tuple(row) for row in documents.hashes.tolist()}
    assert of == {divmod(xxhash.xxh3_128_intdigest(text), 1 << 64) for text in (b"Hello world", b"no id")}
    assert sorted(map(tuple, documents.id_hashes.tolist())) == [
        (0, 0),
        divmod(xxhash.xxh3_128_intdigest(b"7"), 1 << 64),
    ]
    assert np.array_equal(np.diff(documents.info_offsets) == 0, ~documents.id_hashes.any(axis=1))
