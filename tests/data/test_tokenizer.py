"""The tokenizer: nothing is lost, nothing in a document is taken for a control token, training is repeatable."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crystal_hpc.data.catalog import read_tokenizer_identity
from crystal_hpc.data.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer, train_tokenizer
from crystal_hpc.errors import StoreError

REPOSITORY = Path(__file__).parents[2]
CRYSTAL = REPOSITORY.parent / "shared/data/crystal_tokenizer.json"

# Plain characters, and everything that a tokenizer is known to trip over.
PIECES = st.sampled_from([*SPECIAL_TOKENS, *BYTE_TOKENS[:12], "▁", "▁▁", " ", "  ", "\n", "\t", "\r\n", "\0", "\ufeff"])
TEXTS = st.lists(st.one_of(st.text(), PIECES, st.text(alphabet=" \n\tthe{}()"))).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def crystal() -> Tokenizer:
    if not CRYSTAL.exists():
        pytest.skip("Crystal's tokenizer.json is not here")
    return Tokenizer.load(CRYSTAL)


@given(text=TEXTS)
@example(" leading and trailing ")
@example("▁<s>▁</s><0x41><|fim_prefix|>")
@example("e\u0301 \u00e9 ﬁ Å \u212b")  # no normalization
@example("\U0010ffff\ufffe\x00\x7f\u2028")
@settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_text_comes_back_exactly_and_without_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= token < 512 for token in ids)


def test_text_that_spells_a_special_token_is_plain_text(tokenizer: Tokenizer) -> None:
    for name in SPECIAL_TOKENS:
        assert tokenizer.id_of(name) not in tokenizer.encode(f"a{name}b")


def test_text_that_spells_a_byte_token_is_not_that_byte(tokenizer: Tokenizer, corpus: Path) -> None:
    assert corpus.read_text().count("<0x0A>") > 10  # often enough for a merge, were it allowed
    assert tokenizer.id_of("<0x0A>") not in tokenizer.encode("<0x0A>")


def test_the_ids_lie_as_in_llama_and_crystal(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_of(name) for name in SPECIAL_TOKENS[:3]] == [0, 1, 2]
    assert [tokenizer.id_of(name) for name in BYTE_TOKENS] == list(range(3, 259))
    assert [tokenizer.id_of(name) for name in SPECIAL_TOKENS[3:]] == list(range(512, 534))
    assert SPECIAL_TOKENS[3] == "<|fim_prefix|>" and SPECIAL_TOKENS[20] == "<|reponame|>"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, 534)


def test_special_tokens_are_spelled_out_when_decoded(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([1, *tokenizer.encode(" of"), 512, 2]) == "<s> of<|fim_prefix|></s>"


def test_merges_shorten_words_and_indents(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode("\n    return")) <= 4


def test_a_batch_is_encoded_like_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == [] and tokenizer.encode("") == []


def train_elsewhere(corpus: Path, out: Path, threads: str) -> bytes:
    """Trains in a process of its own, with another hash seed and number of threads."""
    program = (
        "import sys; from pathlib import Path; from crystal_hpc.data.tokenizer import train_tokenizer\n"
        "train_tokenizer([Path(sys.argv[1])], Path(sys.argv[2]), 512)"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program, corpus, out], check=True, env=environment)
    return (out / "tokenizer.json").read_bytes()


def test_the_same_documents_give_the_same_tokenizer_bytes(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    expected = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert train_elsewhere(corpus, tmp_path / "one", "1") == expected
    assert train_elsewhere(corpus, tmp_path / "two", "2") == expected


def test_the_files_may_come_in_any_order(jsonl: Callable[..., Path], texts: list[str], tmp_path: Path) -> None:
    a, b = jsonl(texts[:60], "a"), jsonl(texts[60:], "b")
    one = train_tokenizer([a, b], tmp_path / "one", 512)
    two = train_tokenizer([b, a], tmp_path / "two", 512)
    assert one.fingerprint == two.fingerprint


def test_common_characters_get_a_token_and_rare_ones_become_bytes(
    jsonl: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    tokenizer = train_tokenizer([jsonl([*texts, "naïve " * 50, "語"])], tmp_path, 512)
    assert len(tokenizer.encode("ï")) == 1 and len(tokenizer.encode("語")) == 3


def test_a_fingerprint_changes_with_the_vocabulary_and_not_with_padding(tokenizer_folder: Path, tmp_path: Path) -> None:
    value: dict[str, Any] = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    original = Tokenizer.load(tokenizer_folder)
    assert (original.fingerprint, original.vocab_size) == read_tokenizer_identity(tokenizer_folder)
    value["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    cut = Tokenizer.load(tmp_path / "tokenizer.json")
    assert cut.fingerprint == original.fingerprint
    assert len(cut.encode("a b c d e f g h")) > 4  # nothing is cut off because a file says so
    value["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert read_tokenizer_identity(tmp_path)[0] != original.fingerprint


def test_too_little_text_for_the_vocabulary_is_an_error(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="different tokens, not 512; train on more text"):
        train_tokenizer([jsonl(["only a few words"])], tmp_path / "out", 512)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_without_room_for_merges_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ask for 512 tokens or more"):
        train_tokenizer([corpus], tmp_path, 300)


def test_a_missing_or_broken_tokenizer_is_one_clear_line(tmp_path: Path, tokenizer_folder: Path) -> None:
    value = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"model": 5}')
    (tmp_path / "odd.json").write_text(json.dumps(value | {"decoder": {"type": "Nonsense"}}))
    for name, said in [
        ("nowhere.json", "no tokenizer at"),
        (".", "no tokenizer at .*tokenizer.json"),
        ("broken.json", "not a Hugging Face tokenizer.json"),
        ("other.json", "not a Hugging Face tokenizer.json"),
        ("odd.json", "not a usable tokenizer.json"),
    ]:
        with pytest.raises(StoreError, match=said) as caught:
            Tokenizer.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def small(names: list[str]) -> dict[str, Any]:
    """A word-level tokenizer with the given special tokens."""
    added = [
        {"id": number, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, name in enumerate(names)
    ]
    vocab = {name: number for number, name in enumerate(names)} | {"word": len(names)}
    return {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "word"},
    }


def test_other_names_for_begin_and_end_are_found(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(small(["<|endoftext|>"])))
    assert (Tokenizer.load(path).bos, Tokenizer.load(path).eos) == (0, 0)
    path.write_text(json.dumps(small(["<eos>", "<bos>"])))
    assert (Tokenizer.load(path).bos, Tokenizer.load(path).eos) == (1, 0)
    path.write_text(json.dumps(small(["[CLS]"])))
    with pytest.raises(StoreError, match="no token to begin a document"):
        Tokenizer.load(path)


def test_crystals_own_tokenizer_loads(crystal: Tokenizer) -> None:
    assert (crystal.vocab_size, crystal.bos, crystal.eos) == (32000, 1, 2)
    text = "def f(x):\n    return x  # <s> is plain text </s>"
    ids = crystal.encode(text)
    assert crystal.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    assert crystal.encode("hello world") == [22172, 3186]
    assert (crystal.fingerprint, 32000) == read_tokenizer_identity(CRYSTAL)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_loads_the_folder_and_agrees(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    text = "  leading ▁ space.\n\n\tThe 漢字 😀 , there ."
    program = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); ids = t(sys.argv[2])['input_ids']\n"
        "print(json.dumps([ids, t.decode(ids, skip_special_tokens=True), t.bos_token_id, t.eos_token_id, len(t)]))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, tokenizer_folder, text], check=True, env=environment, capture_output=True
    )
    # A document begins with BOS there as it does in training.
    assert json.loads(done.stdout.splitlines()[-1]) == [[1, *tokenizer.encode(text)], text, 1, 2, 534]
