"""The index of JSON Lines files that `build` makes: where each one lies, in which order, what they say.

The first step of a token's way; `data/build` is the caller. `index_corpus` scans the files once and remembers only
numbers, so an index is some 40 bytes a document; `read_documents` fetches the texts later, a shard at a time. The order
is keyed by (seed, text): it does not depend on the names, the number or the order of the files.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from crystal_hpc.errors import StoreError

# Told while something long goes on: what, how much is done, how much there is in all.
Progress = Callable[[str, int, int], None]

MOST_REJECTED = 0.01  # of all lines
BLANK = "blank line"  # counted, but no sign of a damaged file: kept out of the limit above
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zX": "xz",
    b"PK\x03\x04": "zip",
}

INDEX_TYPE = np.dtype(
    [("key", "<u8"), ("tie", "<u8"), ("file", "<u4"), ("offset", "<i8"), ("length", "<i8"), ("text_bytes", "<i8")]
)


@dataclass(frozen=True)
class Document:
    """One document of a corpus; `source` and `path` are empty where the line does not say."""

    text: str
    source: str = ""
    path: str = ""


class Rejected(ValueError):
    """A line that holds no usable document; the message is the reason, in a form that can be counted."""


@dataclass(frozen=True)
class CorpusIndex:
    """Where every document of a corpus lies, sorted by shuffle key.

    `entries` is an INDEX_TYPE array, one record a document: its 128-bit shuffle key in two halves (`key`, `tie`), its
    place (`file` number, byte `offset` and `length` of the line) and its text's UTF-8 `text_bytes`.
    """

    files: tuple[Path, ...]
    seed: int
    entries: npt.NDArray[Any]
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hex digest of the documents and their order, blind to where they lie."""
        digest = xxhash.xxh3_128()
        for column in ("key", "tie", "text_bytes"):
            digest.update(self.entries[column].tobytes())
        return digest.hexdigest()


def parse_line(line: bytes) -> Document:
    """The document in a line of JSON; raises Rejected with the reason where there is none."""
    if not line.strip():
        raise Rejected(BLANK)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise Rejected("not UTF-8 JSON") from None
    if not isinstance(value, dict) or "text" not in value:
        raise Rejected("no text")
    text = value["text"]
    if not isinstance(text, str):
        raise Rejected("text is not a string")
    if not text.strip():
        raise Rejected("empty text")
    # JSON can name half a surrogate pair ("\ud800"), which is no character and cannot be encoded.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Rejected("lone surrogate") from None
    return Document(text, str(value.get("source", "")), str(value.get("path", value.get("id", ""))))


def shuffle_key(text: bytes, seed: int) -> tuple[int, int]:
    """The 128-bit hash of (seed, text) as two 64-bit halves: the sort key, and a tie-break between different texts."""
    digest = xxhash.xxh3_128_intdigest(text, seed)
    return digest >> 64, digest & (2**64 - 1)


def index_corpus(
    paths: Iterable[Path], seed: int = 1, most_rejected: float = MOST_REJECTED, on_progress: Progress | None = None
) -> CorpusIndex:
    """Scans JSON Lines files and returns the place and shuffle key of every document, sorted by key.

    `seed` lies in 0..2**64-1. Lines without a usable document are counted by reason in `rejected`. Raises StoreError
    for a missing, unreadable or compressed file, a corpus without documents, and when more than `most_rejected` (a
    share) of the lines that are not blank are unusable; it names the first of them.
    """
    files = tuple(Path(path) for path in paths)
    if not files:
        raise StoreError("no corpus files were named: give at least one .jsonl file")
    if not 0 <= seed < 2**64:
        raise StoreError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1")
    sizes = [check_file(path) for path in files]
    rejections = _Rejections()
    chunks = []
    for number, path in enumerate(files):
        lines = _lines(path, sum(sizes[:number]), sum(sizes), on_progress)
        chunks.append(_index_file(number, path, lines, seed, rejections))
    entries = np.concatenate(chunks)
    rejections.check(most_rejected, len(entries), files)
    entries = entries[np.lexsort((entries["text_bytes"], entries["tie"], entries["key"]))]
    return CorpusIndex(files, seed, entries, dict(sorted(rejections.counts.items())))


class _Rejections:
    """The lines that index_corpus could not use: how many for each reason, and where the first one is."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first = ""

    def add(self, path: Path, line_number: int, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if reason != BLANK and not self.first:
            self.first = f"the first is line {line_number} of {path} ({reason})"

    def check(self, most: float, documents: int, files: tuple[Path, ...]) -> None:
        bad = sum(count for reason, count in self.counts.items() if reason != BLANK)
        if bad > most * (bad + documents):
            raise StoreError(
                f"{bad} of {bad + documents} lines hold no usable document, more than the {most:.2%} allowed; "
                f"{self.first}; each line must be a JSON object with a text that is not empty"
            )
        if not documents:
            raise StoreError(f"the corpus is empty: {', '.join(map(str, files))} hold no document")


def check_file(path: Path) -> int:
    """The size of a corpus file in bytes; raises StoreError where it cannot be read as JSON Lines."""
    if not path.exists():
        raise StoreError(f"{path}: no such corpus file")
    if not path.is_file():
        raise StoreError(f"{path}: not a file; name the .jsonl files themselves, for example {path}/*.jsonl")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise StoreError(f"{path}: the corpus file cannot be read ({error.strerror})") from error
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise StoreError(f"{path}: the corpus file is compressed ({name}); unpack it first")
    return path.stat().st_size


def _lines(path: Path, before: int, total: int, on_progress: Progress | None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of every line of a file that has `before` of `total` bytes in front of it."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            yield offset, line
            offset += len(line)
            if on_progress and number % 256 == 0:
                on_progress("indexing", before + offset, total)


def _index_file(
    number: int, path: Path, lines: Iterable[tuple[int, bytes]], seed: int, rejections: _Rejections
) -> npt.NDArray[Any]:
    """The INDEX_TYPE records of one file's documents."""
    records = []
    for line_number, (offset, line) in enumerate(lines, 1):
        try:
            text = parse_line(line).text.encode()
            records.append((*shuffle_key(text, seed), number, offset, len(line), len(text)))
        except Rejected as reason:
            rejections.add(path, line_number, str(reason))
    return np.array(records, INDEX_TYPE)


def read_document(file: BinaryIO, offset: int, length: int) -> Document:
    """The document in the `length` bytes at `offset`; raises Rejected where there is none (any more)."""
    file.seek(offset)
    return parse_line(file.read(length))


def read_documents(index: CorpusIndex, start: int, stop: int) -> list[Document]:
    """Documents start..stop-1 of the shuffled order. Raises StoreError when a file is not what it was when indexed.

    Reads file by file and forwards, since jumping about is what shared disks are worst at.
    """
    entries = index.entries[start:stop]
    places = np.lexsort((entries["offset"], entries["file"]))
    found: list[Document | None] = [None] * len(entries)
    for number, group in groupby(places, key=lambda place: int(entries["file"][place])):
        path = index.files[number]
        with open(path, "rb") as file:
            for place in group:
                found[place] = _read_again(path, file, entries[place], index.seed)
    return [document for document in found if document is not None]


def _read_again(path: Path, file: BinaryIO, entry: Any, seed: int) -> Document:
    """A document that was indexed before, checked against its key."""
    try:
        document = read_document(file, int(entry["offset"]), int(entry["length"]))
        unchanged = shuffle_key(document.text.encode(), seed) == (int(entry["key"]), int(entry["tie"]))
    except Rejected:
        unchanged = False
    if not unchanged:
        raise StoreError(f"{path}: the corpus file was changed while it was read; run the same command again")
    return document
