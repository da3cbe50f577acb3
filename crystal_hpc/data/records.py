"""One record of a corpus becomes one document, or the reason why it does not.

Part of the first step of a token's way: `corpus` cuts files into records, and every record goes through here, whatever
its format, so that the same text is accepted or rejected alike from JSON Lines, Parquet and plain files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

# Why a record is rejected. Each can be counted; "longer than N bytes" is the one that depends on a setting.
BLANK = "blank line"  # counted, but no sign of a damaged file: kept out of the limit
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_OBJECT = "not a JSON object"
NO_TEXT = "no text"
NOT_STRING = "text is not a string"
EMPTY = "empty text"
NUL = "NUL character"
SURROGATE = "lone surrogate"

LONGEST = 4 << 30  # bytes of a record; one that is longer is not even held in memory
SAMPLE = 200  # characters of a rejected record that are shown


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus. `id`, `language` and `path` are empty where the record does not say."""

    text: str
    id: str = ""
    language: str = ""
    path: str = ""


@dataclass(frozen=True)
class Fields:
    """The names of the JSON keys or Parquet columns of a document; only the one for the text must be there."""

    text: str = "text"
    id: str = "id"
    language: str = "language"
    path: str = "path"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that holds no usable document.

    `reason` is a phrase to count by. `at` says where in its file: "byte 1234" (of the unpacked stream), "row 17" or,
    where a unit holds many text files, the name of the file. `sample` is how the record begins, printable.
    """

    reason: str
    at: str
    sample: str


def too_long(longest: int) -> str:
    """The reason of a record with more than `longest` bytes."""
    return f"longer than {longest} bytes"


def printable(text: str) -> str:
    """A text in one line that any terminal can show: what cannot be printed is written as Python would escape it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def sample_of(record: bytes | bytearray | str) -> str:
    """How a record begins, in at most SAMPLE printable characters."""
    head = record[:SAMPLE]
    text = head if isinstance(head, str) else head.decode("utf-8", "replace")
    return printable(text)[:SAMPLE]


def fault_of_text(text: str) -> str:
    """Why a text cannot be a document, or "". It is asked of every document, so it costs no copy of the text."""
    if not text or text.isspace():
        return EMPTY
    return NUL if "\0" in text else ""


def parse_line(line: bytes | bytearray, fields: Fields) -> Document | str:
    """The document in a line of JSON Lines, or the reason why there is none."""
    try:
        value = orjson.loads(line)
        text = value[fields.text]
    except (orjson.JSONDecodeError, MemoryError, KeyError, TypeError, IndexError):
        return _parse_odd_line(line, fields)
    if type(value) is not dict or type(text) is not str or type(value.get(fields.id)) is float:
        return _parse_odd_line(line, fields)  # an id that is too large for 64 bits comes as a float
    if fault := fault_of_text(text):
        return fault
    return Document(text, *_details(value, fields))


def _parse_odd_line(line: bytes | bytearray, fields: Fields) -> Document | str:
    """The same by Python's own reader: it takes what only it accepts (NaN, a deep nest), and finds the reason."""
    if not line.strip():
        return BLANK
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError):
        return NOT_JSON
    if not isinstance(value, dict):
        return NOT_OBJECT
    text = value.get(fields.text)
    if text is None:
        return NO_TEXT
    if not isinstance(text, str):
        return NOT_STRING
    details = _details(value, fields)
    # JSON can name half a surrogate pair ("\ud800"), which is no character and cannot be encoded.
    if any(_has_lone_surrogate(part) for part in (text, *details)):
        return SURROGATE
    return fault_of_text(text) or Document(text, *details)


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _details(value: Mapping[str, Any], fields: Fields) -> tuple[str, str, str]:
    """Id, language and path of a record."""
    return _said(value, fields.id), _said(value, fields.language), _said(value, fields.path)


def _said(value: Mapping[str, Any], key: str) -> str:
    """What a record says under a key, as a string; "" where it says nothing, or a list or object."""
    said = value.get(key)
    if said is None or type(said) is str:
        return said or ""
    return "" if isinstance(said, list | dict) else str(said)


def parse_row(row: Mapping[str, Any], fields: Fields, longest: int = LONGEST) -> Document | str:
    """The document in a row of Parquet, whose text comes as bytes, or the reason why there is none."""
    raw = row[fields.text]
    if raw is None:
        return NO_TEXT
    if len(raw) > longest:
        return too_long(longest)
    try:
        text = raw.decode()
        details = _details({key: _decoded(said) for key, said in row.items() if key != fields.text}, fields)
    except UnicodeDecodeError:
        return NOT_UTF8
    return fault_of_text(text) or Document(text, *details)


def _decoded(said: Any) -> Any:
    return said.decode() if isinstance(said, bytes) else said


def parse_file(content: bytes, name: str) -> Document | str:
    """The document that is the content of a text file, or the reason why there is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return NOT_UTF8
    return fault_of_text(text) or Document(text, path=name)
