"""The first half of a build: each unit of a corpus is read, encoded, and written as parts, small shards of their own.

Between `corpus` and `merge` in the flow of a token. A part holds what fits into memory, sorted by shuffle key; beside
it lies its account, part-*.json, written last: what was read, accepted and rejected. A unit that was cut short goes on
behind its finished parts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from crystal_hpc.data.corpus import Document, Fields, Rejected, Rejections, Unit, read_unit
from crystal_hpc.data.shard import Documents, Tokens, token_type, write_shard
from crystal_hpc.data.sorting import in_order
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import StoreError
from crystal_hpc.files import read_json, write_json

PART_TOKENS = 32 << 20  # in a part: what is held in memory
PART_DOCUMENTS = 1 << 20  # likewise
BATCH_DOCUMENTS = 1 << 14
BATCH_CHARACTERS = 4_000_000  # handed to the tokenizer at a time: soon done when asked to stop
PIECE_CHARACTERS = 16_000_000  # a longer text is encoded in pieces: engines need many times its size
NO_TOKENS = "no tokens"

Watch = Callable[["Account"], None]  # shows progress, or raises


@dataclass
class Account:
    """What became of the records of a part, or of many."""

    records: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of the unit, read for this."""
    rejections: Rejections = field(default_factory=Rejections)

    def add(self, other: "Account") -> None:
        """Counts another account into this one."""
        self.records += other.records
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.rejections.merge(other.rejections)

    def as_json(self) -> dict[str, Any]:
        """The content of a part's account on disk."""
        return vars(self) | {"rejections": self.rejections.as_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Account":
        """The inverse of `as_json`; keys beside its own are left out."""
        counts = {key: value[key] for key in ("records", "documents", "tokens", "bytes")}
        return cls(**counts, rejections=Rejections.from_json(value["rejections"]))


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens: what all parts of a build have in common."""

    tokenizer: Tokenizer
    fields: Fields
    seed: int
    bos: int | None
    eos: int | None
    longest: int

    @property
    def ends(self) -> tuple[int | None, int | None]:
        """The ids before and behind each document."""
        return self.bos, self.eos


def unit_name(unit: Unit) -> str:
    """Names a unit's parts: another file, another time of change or another cut gives another name."""
    return f"part-{xxhash.xxh3_64_hexdigest(repr(unit).encode(errors='surrogateescape'))}"


def part_file(unit: str, number: int, ending: str = "json") -> str:
    """The file name of a unit's part: its account or, ending in h5, its documents."""
    return f"{unit}-{number:04d}.{ending}"


def is_encoded(unit: Unit, folder: Path) -> bool:
    """Whether all parts of a unit are there."""
    parts = finished_parts(unit, folder)
    return bool(parts) and bool(read_json(parts[-1])["last"])


def finished_parts(unit: Unit, folder: Path) -> list[Path]:
    """The accounts of a unit's parts, from the first to the last before one that is missing."""
    found: list[Path] = []
    while (account := folder / part_file(unit_name(unit), len(found))).exists():
        about = read_json(account)["shard"]
        if about and _size(folder / about["name"]) != about["bytes"]:
            break  # somebody deleted or cut it: made again
        found.append(account)
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def encode_unit(unit: Unit, folder: Path, encoding: Encoding, watch: Watch) -> None:
    """Writes the parts of a unit that are not there yet. Raises StoreError, DiskError, and what `watch` raises."""
    done = finished_parts(unit, folder)
    before = Account()
    for path in done:
        before.add(Account.from_json(read_json(path)))
    number, part = len(done), _Part(encoding, unit, before.bytes)
    for record, (item, read) in enumerate(read_unit(unit, encoding.fields, longest=encoding.longest)):
        if record < before.records:
            continue
        if part.add(item, read):
            watch(part.account)
        if part.is_full:
            part.write(folder, number, last=False)
            number, part = number + 1, _Part(encoding, unit, read)
    part.account.bytes = unit.size - part.start
    part.write(folder, number, last=True)
    watch(Account())


class _Part:
    """A part in the making."""

    def __init__(self, encoding: Encoding, unit: Unit, start: int) -> None:
        self.account = Account()
        self.start = start  # bytes of the unit before this part
        self._encoding, self._unit = encoding, unit
        self._batch: list[Document] = []
        self._characters = 0
        self._tokens: list[Tokens] = []
        self._lengths: list[int] = []
        self._hashes: list[tuple[int, int]] = []
        self._ids: list[tuple[int, int]] = []
        self._info: list[bytes] = []

    @property
    def is_full(self) -> bool:
        return self.account.tokens >= PART_TOKENS or self.account.documents >= PART_DOCUMENTS

    def add(self, item: Document | Rejected, read: int) -> bool:
        """Takes in a record, `read` bytes into the unit; whether a batch of them was encoded for it."""
        self.account.records += 1
        self.account.bytes = read - self.start
        if isinstance(item, Rejected):
            self.account.rejections.add(self._unit.path, item)
            return False
        self._batch.append(item)
        self._characters += len(item.text)
        if self._characters < BATCH_CHARACTERS and len(self._batch) < BATCH_DOCUMENTS:
            return False
        self._encode()
        return True

    def _encode(self) -> None:
        batch, self._batch, self._characters = self._batch, [], 0
        dtype = token_type(self._encoding.tokenizer.vocab_size)
        front, back = ([] if end is None else [np.array([end], dtype)] for end in self._encoding.ends)
        pieces: list[Tokens] = [np.empty(0, dtype)]
        for document, ids in zip(batch, _encode_texts(self._encoding.tokenizer, batch, dtype), strict=True):
            length = len(front) + len(ids) + len(back)
            if not length:
                said = Rejected(NO_TOKENS, document.id or document.path, document.text[:200])
                self.account.rejections.add(self._unit.path, said)
                continue
            pieces += (*front, ids, *back)
            self._lengths.append(length)
            self._hashes.append(_hash(document.text))
            self._ids.append(_hash(document.id) if document.id else (0, 0))
            self._info.append(_info(document))
            self.account.documents += 1
            self.account.tokens += length
        self._tokens.append(np.concatenate(pieces))

    def write(self, folder: Path, number: int, last: bool) -> None:
        """Writes the part and, last, its account."""
        if self._batch:
            self._encode()
        unit, shard = unit_name(self._unit), None
        if self._hashes:
            documents = Documents(
                offsets=np.cumsum([0, *self._lengths], dtype=np.int64),
                hashes=np.array(self._hashes, np.uint64),
                id_hashes=np.array(self._ids, np.uint64),
                info_offsets=np.cumsum([0, *map(len, self._info)], dtype=np.int64),
                info=np.frombuffer(b"".join(self._info), np.uint8),
            )
            sorted_documents, tokens = in_order(documents, np.concatenate(self._tokens), self._encoding.seed)
            shard = vars(write_shard(folder / part_file(unit, number, "h5"), sorted_documents, tokens, {}))
        write_json(folder / part_file(unit, number), self.account.as_json() | {"last": last, "shard": shard})


def _hash(text: str) -> tuple[int, int]:
    """xxh3_128 of a text in UTF-8, as two halves."""
    return divmod(xxhash.xxh3_128_intdigest(text.encode()), 1 << 64)


def _info(document: Document) -> bytes:
    """What is said of a document beside its text, as JSON; nothing where nothing is said."""
    said = {"id": document.id, "language": document.language, "path": document.path}
    given = {key: value for key, value in said.items() if value}
    return orjson.dumps(given) if given else b""


def _encode_texts(tokenizer: Tokenizer, documents: list[Document], dtype: np.dtype[Any]) -> Iterator[Tokens]:
    """The ids of each document."""
    pieces = [list(text_pieces(document.text)) for document in documents]
    ids, offsets = tokenizer.encode_flat([first for first, *_ in pieces])
    narrow = ids.astype(dtype)
    for (start, stop), (_, *others) in zip(pairwise(offsets.tolist()), pieces, strict=True):
        more = [tokenizer.encode_flat([piece], inside=True)[0].astype(dtype) for piece in others]
        yield np.concatenate([narrow[start:stop], *more]) if more else narrow[start:stop]


def text_pieces(text: str) -> Iterator[str]:
    """The text whole or, where it is very long, cut in front of blanks that follow something else.

    Words are encoded with the blank before them, so a text in pieces gets the ids that it would have got whole.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = text.find(" ", start + PIECE_CHARACTERS)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find(" ", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def read_accounts(units: list[Unit], folder: Path) -> tuple[Account, list[Path]]:
    """The account of all units together, and the parts that hold documents, in order of the units.

    Raises StoreError for a part that vanished.
    """
    total, parts = Account(), []
    for unit in units:
        accounts = finished_parts(unit, folder)
        if not accounts or not read_json(accounts[-1])["last"]:
            raise StoreError(f"{folder}: parts of {unit.path} vanished while they were put together; run it again")
        for path in accounts:
            account = read_json(path)
            total.add(Account.from_json(account))
            if account["shard"]:
                parts.append(path.with_suffix(".h5"))
    return total, parts
