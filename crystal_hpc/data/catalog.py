"""What a token store or a tokenizer is, read without its heavy parts: for planning on a login node.

`crystal plan` and the sampling order need only totals and fingerprints, so this module uses the standard library
alone. `data/build` writes what is read here; `data/store` reads the tokens themselves.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_hpc.errors import StoreError
from crystal_hpc.files import read_json

FORMAT = 2
STORE_FILE = "store.json"  # the marker: written last, names everything
BUILD_FILE = "build.json"  # the plan: written first, says what the folder is to become
TOKENIZER_FILE = "tokenizer.json"
HELD_OUT = "-held-out"  # behind the name of a store: that of the store beside it which is never trained on


def shard_name(number: int) -> str:
    """The file name of a store's shard."""
    return f"shard-{number:05d}.h5"


@dataclass(frozen=True)
class ShardInfo:
    """One HDF5 file of a store; see `data.shard`."""

    name: str
    documents: int
    tokens: int
    max_token: int
    bytes: int  # of the file
    tokens_at: int  # byte of the file at which the tokens begin
    digests_at: int  # byte of the file at which the digests of their blocks begin
    digest: str  # of the file but for its tokens, block digests and all


@dataclass(frozen=True)
class StoreInfo:
    """A finished token store, as its store.json tells it."""

    folder: Path
    name: str
    tokenizer: str  # the fingerprint
    vocab_size: int  # of the tokenizer: ids are 0..vocab_size-1
    max_token: int  # the largest id that occurs
    dtype: str  # "uint16" or "uint32"
    documents: int
    tokens: int
    seed: int  # of the shuffle
    bos: int | None  # the id put in front of every document, if any
    eos: int | None  # the id put behind every document, if any
    rejected: Mapping[str, int]  # records of the corpus that were not used, by reason
    shards: tuple[ShardInfo, ...]
    digest: str  # of the shards' digests
    layout: str = "tokens"  # "rows": rows with masks and labels of their own, as Crystal's were published

    @property
    def row_length(self) -> int | None:
        """Inputs of a row in the layout "rows", whose rows are counted as documents; None where rows may be cut."""
        return (self.tokens - 1) // self.documents if self.layout == "rows" else None

    def as_json(self) -> dict[str, Any]:
        """The content of store.json."""
        value = {"format": FORMAT} | {key: item for key, item in vars(self).items() if key != "folder"}
        return value | {"shards": [vars(shard) for shard in self.shards]}


def digest_of(digests: Iterable[str]) -> str:
    """The digest of a list of digests, in hex."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]


def rows(tokens: int, sequence_length: int) -> int:
    """How many training rows a stream of tokens yields: row i is tokens i*L .. i*L+L, both ends included."""
    return max(0, (tokens - 1) // sequence_length)


def read_store_info(folder: Path) -> StoreInfo:
    """Reads and checks a store's marker. Raises StoreError for a store that is missing, half-written, of another
    format, or whose shards are not there with their recorded sizes; the tokens themselves are not read."""
    marker = folder / STORE_FILE
    try:
        value = read_json(marker)
    except FileNotFoundError:
        raise StoreError(_why_missing(folder)) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{marker}: cannot be read ({error}); restore it or build the store again") from error
    info = _parse(folder, marker, value)
    for shard in info.shards:
        _check_size(folder / shard.name, shard)
    return info


def _why_missing(folder: Path) -> str:
    """What to tell a user about a folder without a store.json."""
    if not folder.is_dir():
        return f"no token store at {folder}; build it with: crystal data build CORPUS.jsonl --out {folder}"
    try:
        expected = int(read_json(folder / BUILD_FILE)["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder}: not a token store ({STORE_FILE} is missing); build one with: crystal data build"
    finished = len(list(folder.glob("shard-*.h5")))
    return (
        f"{folder}: the store is half-written, {finished} of {expected} shards are there; "
        "run the same build command again to finish it"
    )


def _parse(folder: Path, marker: Path, value: Any) -> StoreInfo:
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise StoreError(f"{marker}: store format {found!r}, but this version reads format {FORMAT}; build it again")
    fields = {key: item for key, item in value.items() if key != "format"}
    try:
        shards = tuple(ShardInfo(**shard) for shard in fields.pop("shards"))
        info = StoreInfo(folder=folder, shards=shards, **fields)
        fits = (
            info.tokens == sum(shard.tokens for shard in shards)
            and info.documents == sum(shard.documents for shard in shards)
            and info.digest == digest_of(shard.digest for shard in shards)
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"{marker}: not a complete store description ({error}); build the store again") from error
    if not fits:
        raise StoreError(f"{marker}: totals and digest do not fit the shards listed; build the store again")
    return info


def _check_size(path: Path, shard: ShardInfo) -> None:
    remedy = "copy the store again, or run its build command again to make this file anew"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path}: the shard is missing ({error.strerror}); {remedy}") from error
    if size != shard.bytes:
        raise StoreError(f"{path}: {size} bytes, but {STORE_FILE} says {shard.bytes}; {remedy}")


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that a path names, itself or as its folder."""
    return path / TOKENIZER_FILE if path.is_dir() else path


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The content of a Hugging Face tokenizer.json, given the file or its folder; raises StoreError."""
    path = tokenizer_file(path)
    try:
        value = json.loads(path.read_bytes())  # bytes: JSON is UTF-8, whatever the locale says
    except FileNotFoundError:
        raise StoreError(f"no tokenizer at {path}; name a {TOKENIZER_FILE} or a folder that holds one") from None
    except OSError as error:
        raise StoreError(f"{path}: the tokenizer cannot be read ({error.strerror})") from error
    except ValueError:
        value = None
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict) or "vocab" not in model or "added_tokens" not in value:
        raise StoreError(
            f"{path}: not a Hugging Face {TOKENIZER_FILE}; it must be JSON with model.vocab and added_tokens"
        )
    content: dict[str, Any] = value
    return content


def tokenizer_identity(value: dict[str, Any]) -> tuple[str, int]:
    """(fingerprint, vocab_size) of a tokenizer.json's content: see read_tokenizer_identity."""
    # Truncation and padding are settings of a caller's, and do not change what an id means.
    kept = {key: item for key, item in value.items() if key not in ("truncation", "padding")}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    vocab = value["model"]["vocab"]
    # Unigram models list [piece, score] in the order of the ids; all others map pieces to ids.
    top = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    top = max([top, *(token["id"] for token in value["added_tokens"])])
    return hashlib.sha256(canonical.encode()).hexdigest()[:16], top + 1


def read_tokenizer_identity(path: Path) -> tuple[str, int]:
    """(fingerprint, vocab_size) of a tokenizer.json or of a folder with one, without loading the tokenizer.

    The fingerprint, 16 hex digits, covers everything that decides ids; `vocab_size` is the largest id plus one. Raises
    StoreError where there is no readable tokenizer.
    """
    return tokenizer_identity(read_tokenizer_json(path))
