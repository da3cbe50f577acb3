"""A small corpus and a tokenizer trained on it, made once for all data tests."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from crystal_hpc.data.tokenizer import train_tokenizer

SENTENCE = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man me"
)
WORDS = SENTENCE.split()


def make_text(number: int) -> str:
    """Document `number` of the test corpus: some prose, some code, some oddities."""
    chance = random.Random(number)
    sentences = [" ".join(chance.choices(WORDS, k=chance.randint(3, 12))).capitalize() for _ in range(12)]
    code = f"def f{number}(x):\n    if x < {number}:\n        return x\n\n    return [x, '{chance.choice(WORDS)}']\n"
    return ". ".join(sentences) + f".\n\n{code}" + chance.choice(["", "\t<s> é\n", "漢字 😀\r\n", "▁ <0x0A></s>"])


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Writes a JSON Lines corpus file."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [make_text(number) for number in range(120)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """120 documents in one file, some 80 kB."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "texts.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A trained tokenizer with 512 tokens and the special ones."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([corpus], folder, 512)
    return folder


@pytest.fixture(scope="session")
def crystal_tokenizer() -> Path:
    """Crystal's own tokenizer.json, where it lies beside the checkout."""
    path = Path(__file__).parents[3] / "shared" / "data" / "crystal_tokenizer.json"
    if not path.exists():
        pytest.skip(f"Crystal's tokenizer.json is not at {path}")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes a corpus file of its own for a test: jsonl(["text", ...], "name")."""

    def write(texts: Iterable[str], name: str = "corpus.jsonl") -> Path:
        return write_jsonl(tmp_path / name, texts)

    return write
