"""Reads documents out of files as users have them: JSON Lines (plain, gzip, zstd), Parquet, folders of text files.

The first step of a token's way; `data/build` and the training of a tokenizer are the callers. `list_units` cuts files
into units of work, which can be read by different processes; `read_unit` streams the documents of one. Whatever the
size of a file, only the record at hand is in memory. A record without a usable document is never passed over in
silence: it comes as a Rejected, for an account of Rejections.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from crystal_hpc.data import parquet
from crystal_hpc.data.records import (
    BLANK,
    LONGEST,
    Document,
    Fields,
    Rejected,
    parse_file,
    parse_line,
    parse_row,
    sample_of,
    too_long,
)
from crystal_hpc.data.rejections import MOST_REJECTED, Rejections
from crystal_hpc.data.streams import BLOCK, BLOCKS, BOM, Damaged, split_lines
from crystal_hpc.data.units import UNIT_BYTES, TextFile, Unit, list_units, shown
from crystal_hpc.errors import StoreError
from crystal_hpc.progress import Progress

__all__ = [
    "BLANK",
    "LONGEST",
    "MOST_REJECTED",
    "UNIT_BYTES",
    "Document",
    "Fields",
    "Progress",
    "Rejected",
    "Rejections",
    "TextFile",
    "Unit",
    "list_units",
    "read_unit",
    "text_of_all",
]

Record = tuple[Document | Rejected, int]
_PROGRESS_EVERY = 256  # records


def read_unit(unit: Unit, fields: Fields, *, longest: int = LONGEST) -> Iterator[Record]:
    """Every record of a unit, as a Document or Rejected, with the bytes of the unit that are read so far.

    A record of more than `longest` bytes is rejected without being held in memory. Raises StoreError for a file that
    cannot be read, is cut off or damaged, or has changed since the unit was listed.
    """
    if unit.format == "text":
        yield from _read_texts(unit, longest)
        return
    _check_unchanged(unit.path, unit.file_size, unit.mtime_ns)
    if unit.format == "parquet":
        yield from _read_rows(unit, fields, longest)
    else:
        yield from _read_lines(unit, fields, longest)
    _check_unchanged(unit.path, unit.file_size, unit.mtime_ns)


def text_of_all(
    inputs: Sequence[Path],
    fields: Fields,
    on_progress: Progress | None = None,
    *,
    what: str = "reading",
    format: str | None = None,
    most_rejected: float = MOST_REJECTED,
) -> Iterator[str]:
    """The texts of all documents in files and folders, file by file, for the training of a tokenizer.

    `what` names the work in progress, which is told in bytes. Raises StoreError as list_units and read_unit do and, at
    the end, when more than `most_rejected` (a share) of the records are unusable or there is no document.
    """
    units = list_units(inputs, format=format)
    total, before, documents = sum(unit.size for unit in units), 0, 0
    rejections = Rejections()
    for unit in units:
        for number, (record, done) in enumerate(read_unit(unit, fields)):
            if on_progress and number % _PROGRESS_EVERY == 0:
                on_progress(what, before + done, total)
            if isinstance(record, Rejected):
                rejections.add(unit.path, record)
            else:
                documents += 1
                yield record.text
        before += unit.size
    rejections.check(most_rejected, documents)


def _check_unchanged(path: Path, size: int, mtime_ns: int) -> None:
    """Raises StoreError where a file is not what it was when it was listed."""
    try:
        now = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if (now.st_size, now.st_mtime_ns) != (size, mtime_ns):
        raise StoreError(f"{shown(path)}: the corpus file was changed while it was read; run the same command again")


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{shown(path)}: the corpus file cannot be read ({error.strerror or error})")


def _read_lines(unit: Unit, fields: Fields, longest: int) -> Iterator[Record]:
    """The records of a JSON Lines unit: of the lines that begin in start..stop-1."""
    try:
        with open(unit.path, "rb", buffering=0) as file:
            at = _first_line(file, unit)
            blocks = BLOCKS[unit.compression](file) if at < unit.stop else iter(())
            for length, line in split_lines(blocks, longest):
                if at == 0 and line.startswith(BOM):
                    line = line[len(BOM) :]
                found = too_long(longest) if length > longest else parse_line(line, fields)
                record = Rejected(found, f"byte {at}", sample_of(line)) if isinstance(found, str) else found
                at += length + 1
                yield record, file.tell() if unit.compression else min(at - unit.start, unit.size)
                if at >= unit.stop and not unit.compression:
                    return
    except Damaged as error:
        raise StoreError(f"{shown(unit.path)}: the {unit.compression} file {error}; fetch it again") from error
    except OSError as error:
        raise _unreadable(unit.path, error) from error


def _first_line(file: IO[bytes], unit: Unit) -> int:
    """Goes to the beginning of the first line that begins in the unit (or behind it), and returns where that is."""
    if unit.start == 0:
        return 0
    at = unit.start - 1  # a line that begins at `start` has its newline before it
    file.seek(at)
    while at < unit.stop and (block := file.read(BLOCK)):
        if (newline := block.find(b"\n")) >= 0:
            file.seek(at + newline + 1)
            return at + newline + 1
        at += len(block)
    return unit.stop


def _read_rows(unit: Unit, fields: Fields, longest: int) -> Iterator[Record]:
    """The records of a Parquet unit."""
    others = [fields.id, fields.language, fields.path]
    found_rows = parquet.rows(unit.path, unit.start, unit.stop, fields.text, others)
    for done, (number, total, row) in enumerate(found_rows, 1):
        found = parse_row(row, fields, longest)
        place = f"row {number}"
        record = Rejected(found, place, sample_of(row[fields.text] or b"")) if isinstance(found, str) else found
        yield record, unit.size * done // total


def _read_texts(unit: Unit, longest: int) -> Iterator[Record]:
    """The records of a unit of text files."""
    done = 0
    for text in unit.files:
        path = unit.path / text.name
        # What a document says of itself has to be UTF-8, which the name of a file need not be.
        name = os.fsencode(text.name).decode("utf-8", "backslashreplace")
        _check_unchanged(path, text.size, text.mtime_ns)
        try:
            with open(path, "rb") as file:
                content = file.read(text.size if text.size <= longest else 1024)
        except OSError as error:
            raise _unreadable(path, error) from error
        found = too_long(longest) if text.size > longest else parse_file(content, name)
        _check_unchanged(path, text.size, text.mtime_ns)
        place = f"file {shown(text.name)}"
        done += text.size
        yield Rejected(found, place, sample_of(content)) if isinstance(found, str) else found, done
