"""The fastest program that gives the right ids: gigatoken where it proves identical to `tokenizers`, else that itself.

Under `data/tokenizer` in the flow of a token. `tokenizers` is the reference; gigatoken is some ten times as fast a
core, but does not read every tokenizer.json, and a fast answer is worth nothing unless it is the same one. So a build
compares the two on hostile strings and on documents of its own corpus before it starts, and records what it found.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from crystal_hpc.errors import StoreError

Ids = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]

# White space in every position, letters of all widths, combining marks, what looks like special or byte tokens, and
# runs that end one character before or after something.
HOSTILE = (
    "", " ", "  ", "\n", "\t\r\n", " lead", "trail ", "two  words", "a\n\n\nb", "tab\tbed", "don't you're 'tis",
    "x=1;\n    y = [2,  3]  # 4\n\n\n", "1234567890 3.14 1,000", "<s>", "</s> <unk>", "<0x0A><0x41>", "▁", "a▁b ▁ c",
    "é", "e\u0301", "漢字かな交じり", "한국어", "עברית", "ไทย", "😀", "👩\u200d👩\u200d👧", "\ufeffx",
    "a\u0000b", "\x1f\x7f\x85\xa0",
    "\u2028\u2029", "\U000e0001", "\U0010fffd", "ﬁ ① Å", "é" * 300, " " * 100 + "x", "ab" * 500, "\n" * 70,
)  # fmt: skip


class Engine(Protocol):
    """Encodes texts into plain ids: no BOS, no EOS, special tokens in a text are ordinary characters."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """uint32 (total,) ids of all texts one after another, and int64 (len(texts) + 1,) where each begins."""


class Tokenizers:
    """Hugging Face's tokenizers."""

    name = f"tokenizers {version('tokenizers')}"

    def __init__(self, value: dict[str, Any]) -> None:
        """From the content of a tokenizer.json; raises the bare Exception that the library raises."""
        self.library = tokenizers.Tokenizer.from_str(json.dumps(value))
        self.library.encode_special_tokens = True
        self.library.no_truncation()
        self.library.no_padding()

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        pieces = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return np.concatenate([np.empty(0, np.uint32), *pieces]), offsets


class Gigatoken:
    """gigatoken; one thread, because builds run a process on every core."""

    name = "gigatoken"

    def __init__(self, value: dict[str, Any]) -> None:
        """From the content of a tokenizer.json; raises whatever the library does about one that it cannot read."""
        import gigatoken

        self.name = f"gigatoken {version('gigatoken')}"
        # Without the special tokens, since they are not to be found in texts.
        kept = [token for token in value["added_tokens"] if not token["special"]]
        self._library = gigatoken.Tokenizer.from_json(
            json.dumps(value | {"added_tokens": kept, "post_processor": None})
        )

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        layout = self._library.encode_batch([text.encode() for text in texts], parallel=False).layout
        offsets = np.asarray(layout.offsets, np.int64)
        return np.asarray(layout.content.data, np.uint32)[offsets[0] : offsets[-1]], offsets - offsets[0]


@dataclass(frozen=True)
class Proof:
    """What the comparison found; builds keep it."""

    engine: str
    reason: str
    texts: int = 0
    """Texts that both engines encoded, identically where `engine` is not the reference."""


def fastest(
    value: dict[str, Any], samples: Sequence[str] = (), reference: Tokenizers | None = None
) -> tuple[Engine, Proof]:
    """The fastest engine that gives the reference's ids for hostile strings and these samples.

    `reference`, of the same tokenizer, is made anew where it is not given.
    """
    reference = reference or Tokenizers(value)
    specials = [token["content"] for token in value["added_tokens"]]
    texts = [*HOSTILE, *specials, *(f"a {special}b" for special in specials), *samples]
    try:
        quick = Gigatoken(value)
        found = quick.encode(texts)
    except BaseException as error:  # Rust's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = f"gigatoken cannot: {' '.join(str(error).split())[:100] or type(error).__name__}"
        return reference, Proof(reference.name, reason)
    expected = reference.encode(texts)
    if np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1]):
        return quick, Proof(quick.name, f"identical to {reference.name}", len(texts))
    return reference, Proof(reference.name, f"{quick.name} gave other ids", len(texts))


def named(
    value: dict[str, Any], name: str | None, samples: Sequence[str], reference: Tokenizers
) -> tuple[Engine, Proof]:
    """The engine of that name (`tokenizers`, `gigatoken`), or the fastest. Raises StoreError if it cannot be had."""
    if name == "tokenizers":
        return reference, Proof(reference.name, "asked for")
    engine, proof = fastest(value, samples, reference)
    if name is None:
        return engine, proof
    if name != "gigatoken":
        raise StoreError(f"tokenizing engine {name!r} is unknown; choose tokenizers or gigatoken")
    if not isinstance(engine, Gigatoken):
        raise StoreError(f"gigatoken cannot be used for this tokenizer ({proof.reason}); leave the choice open")
    return engine, proof


def for_inside(value: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json for text in the middle of a document: the same, but nothing is put in front of it."""
    value = copy.deepcopy(value)
    value["normalizer"] = _without_prefix(value.get("normalizer"))
    value["pre_tokenizer"] = _without_prefix(value.get("pre_tokenizer"))
    return value


def _without_prefix(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            part[key] = [kept for kept in map(_without_prefix, part[key]) if kept is not None]
    if part.get("type") == "Metaspace":
        part["prepend_scheme"] = "never"
        part.pop("add_prefix_space", None)
    if part.get("type") == "ByteLevel":
        part["add_prefix_space"] = False
    return part


def token_bytes(value: dict[str, Any], size: int) -> list[bytes | None]:
    """What each of `size` ids stands for in a text, in UTF-8; None for special tokens and for ids without a token."""
    vocab = value["model"]["vocab"]
    names = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
    kinds = _kinds(value.get("decoder")) | _kinds(value.get("pre_tokenizer"))
    spell = _from_byte_level if "ByteLevel" in kinds else str.encode
    blank = "Metaspace" in kinds or _replaces_metaspace(value.get("decoder"))
    found: list[bytes | None] = [None] * size
    for name, number in names.items():
        if value["model"].get("byte_fallback") and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            found[number] = bytes([int(name[3:5], 16)])
        else:
            found[number] = spell(name.replace("▁", " ") if blank else name)
    for token in value["added_tokens"]:
        found[token["id"]] = None if token["special"] else token["content"].encode()
    return found


def _kinds(part: Any) -> set[str]:
    if not isinstance(part, dict):
        return set()
    below = [piece for key in ("decoders", "normalizers", "pretokenizers") for piece in part.get(key, [])]
    return {part["type"], *(kind for piece in below for kind in _kinds(piece))}


def _replaces_metaspace(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Replace":
        return bool(decoder["pattern"].get("String") == "▁" and decoder["content"] == " ")
    return any(map(_replaces_metaspace, decoder.get("decoders", [])))


def _byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's byte-level BPE writes for bytes: printable ones for themselves, then U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _from_byte_level(name: str) -> bytes:
    return bytes(_ALPHABET[char] for char in name if char in _ALPHABET)
