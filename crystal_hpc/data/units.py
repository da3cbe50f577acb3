"""Finds the files of a corpus and cuts them into units of work, each of which one process reads from end to end.

The beginning of the first step of a token's way; `corpus.read_unit` reads what is listed here. The list depends on the
files alone: whatever the order in which they were named, and on whatever node, it is the same.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

from crystal_hpc.data import parquet
from crystal_hpc.data.records import printable
from crystal_hpc.data.streams import BOM
from crystal_hpc.errors import StoreError

UNIT_BYTES = 128 << 20
FORMATS = ("jsonl", "parquet", "text")
ACCEPTED = (
    "JSON Lines (.jsonl, .ndjson or .json; plain, .gz or .zst), Parquet (.parquet), a folder of these or of text files"
)

# Names that make a folder one of data files. Compressions that are not read are here too, so as not to be overlooked.
_DATA_NAME = re.compile(r"\.(jsonl|ndjson)(\.(gz|zst|bz2|xz|zip))?$|\.json\.(gz|zst|bz2|xz|zip)$|\.parquet$", re.I)
_LIKE_DATA = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.\w+)?$|\.(csv|tsv|arrow|lz4|zstd)$", re.I)
_LINES_NAME = re.compile(r"\.(jsonl|ndjson|json)(\.\w+)?$", re.I)
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame of notes, with which some writers begin
_UNREAD = {b"BZh": "bzip2", b"\xfd7zX": "xz", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class TextFile:
    """One of the text files of a unit: its name relative to the unit's folder, its bytes and time when listed."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that is read in one go.

    `start` and `stop` count bytes of a plain or compressed JSON Lines file (the unit owns the lines that begin there),
    row groups of a Parquet file, or text files of the folder `path`, which `files` names. `size` is the bytes to read,
    compressed ones where they are, for showing progress. `file_size` and `mtime_ns` are those of the file when listed.
    """

    path: Path
    format: str  # one of FORMATS
    start: int
    stop: int
    size: int
    file_size: int = 0
    mtime_ns: int = 0
    compression: str = ""  # of JSON Lines: "", "gzip" or "zstd"
    files: tuple[TextFile, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A file of the corpus; `root` is the folder from which its name counts."""

    path: Path  # with all links followed
    root: Path
    name: str
    format: str | None  # None: to be found out


def list_units(inputs: Sequence[Path], *, unit_bytes: int = UNIT_BYTES, format: str | None = None) -> list[Unit]:
    """The units of work in files and folders, sorted by path: the same ones in whatever order the inputs come.

    A folder stands for the data files in it and below or, if it holds none, for its text files, each a document; hidden
    files are skipped. A unit has about `unit_bytes` bytes of a file, or is a whole compressed file. `format`, one of
    FORMATS, says what all files are instead of finding out. Raises StoreError for a file that is missing, cannot be
    read, is of no known format or is named twice, and for a folder without documents.
    """
    if format is not None and format not in FORMATS:
        raise StoreError(f"corpora of format {format!r} are not known: choose one of {', '.join(FORMATS)}")
    if unit_bytes < 1:
        raise StoreError(f"a unit of {unit_bytes} bytes is too small; the default is {UNIT_BYTES}")
    if not inputs:
        raise StoreError(f"no corpus files were named: give at least one of {ACCEPTED}")
    found = sorted((file for path in inputs for file in _find(Path(path), format)), key=lambda file: file.path)
    for one, other in pairwise(found):
        if one.path == other.path:
            raise StoreError(f"{shown(one.path)}: named twice, so it would be read twice; name each file once")
    units: list[Unit] = []
    texts: list[_Found] = []
    for file in found:
        if file.format == "text":
            texts.append(file)
        else:
            units += _units_of_file(file, unit_bytes)
    return sorted([*units, *_units_of_texts(texts, unit_bytes)], key=lambda unit: (unit.path, unit.format, unit.start))


def shown(path: Path | str) -> str:
    """A path in one line, for messages."""
    return printable(str(path))


def _find(path: Path, format: str | None) -> Iterator[_Found]:
    """The files that an input stands for."""
    try:
        path.lstat()
    except OSError as error:
        said = "no such corpus file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise StoreError(f"{shown(path)}: {said}") from error
    if not path.exists():
        raise StoreError(f"{shown(path)}: no such corpus file")
    whole = path.resolve()
    if not path.is_dir():
        yield _Found(whole, path.parent.resolve(), path.name, format)
        return
    names = sorted(_names_below(path, "", set()))
    wanted = [name for name in names if _DATA_NAME.search(name)]
    if not wanted and names and all(name.lower().endswith(".json") for name in names):
        wanted = names
    odd = [name for name in names if name not in wanted and _LIKE_DATA.search(name)]
    if format is None and odd and (wanted or len(odd) < len(names)):
        said = f"holds {shown(odd[0])}{f' and {len(odd) - 1} more like it' if len(odd) > 1 else ''} beside other files"
        raise StoreError(f"{shown(path)}: {said}: is that data? Name the files that are, or say --format")
    if format == "text" or (format is None and not wanted):
        wanted, format = names, "text"
    if not wanted:
        raise StoreError(f"{shown(path)}: the folder holds no {format or 'corpus'} files; give {ACCEPTED}")
    yield from (_Found((path / name).resolve(), whole, name, format) for name in wanted)


def _names_below(folder: Path, prefix: str, seen: set[Path]) -> Iterator[str]:
    """The relative names of all files in a folder and below that are not hidden; links are followed."""
    place = folder.resolve()
    if place in seen:
        raise StoreError(f"{shown(folder)}: leads to a folder that was read before; remove the link")
    seen.add(place)
    try:
        with os.scandir(folder) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise StoreError(f"{shown(folder)}: the folder cannot be read ({error.strerror})") from error
    for name, is_folder in listed:
        if is_folder:
            yield from _names_below(folder / name, f"{prefix}{name}/", seen)
        else:
            yield prefix + name


def _stat(path: Path) -> os.stat_result:
    """A file's stat; raises StoreError where it is missing or no file."""
    try:
        found = path.stat()
    except OSError as error:
        raise StoreError(f"{shown(path)}: the corpus file cannot be read ({error.strerror})") from error
    if not path.is_file():
        raise StoreError(f"{shown(path)}: neither a file nor a folder; give {ACCEPTED}")
    return found


def _units_of_file(file: _Found, unit_bytes: int) -> list[Unit]:
    """The units of a JSON Lines or Parquet file; none if there is nothing in it."""
    stat = _stat(file.path)
    format, compression = _recognize(file)
    size, time = stat.st_size, stat.st_mtime_ns
    unit = partial(Unit, file.path, format, file_size=size, mtime_ns=time, compression=compression)
    if format == "parquet":
        ranges = parquet.row_group_ranges(file.path, unit_bytes)
        return [unit(start=start, stop=stop, size=part) for start, stop, part in ranges]
    if compression:
        return [unit(start=0, stop=size, size=size)]
    cuts = [*range(0, size, unit_bytes), size]
    return [unit(start=start, stop=stop, size=stop - start) for start, stop in pairwise(cuts)]


def _recognize(file: _Found) -> tuple[str, str]:
    """The format of a file and its compression, from how it begins and, where that does not tell, from its name."""
    path, name = file.path, file.name
    try:
        with open(path, "rb") as opened:
            start = opened.read(4096)
    except OSError as error:
        raise StoreError(f"{shown(path)}: the corpus file cannot be read ({error.strerror})") from error
    for magic, compression in _UNREAD.items():
        if start.startswith(magic):
            raise StoreError(f"{shown(path)}: compressed with {compression}, which is not read; unpack it, or use zstd")
    compression = next((said for magic, said in _COMPRESSIONS.items() if start.startswith(magic)), "")
    if _ZSTD_SKIPPABLE.match(start):
        compression = "zstd"
    if not start and name.lower().endswith((".gz", ".zst")):
        raise StoreError(f"{shown(path)}: empty, so not a compressed file; fetch it again")
    if file.format == "parquet" or name.lower().endswith(".parquet") or (start[:4] == b"PAR1" and not file.format):
        return "parquet", ""
    if file.format or compression or _LINES_NAME.search(name) or start.removeprefix(BOM).lstrip()[:1] == b"{":
        return "jsonl", compression
    raise StoreError(f"{shown(path)}: not recognized as a corpus file; give {ACCEPTED}, or say that the format is text")


def _units_of_texts(files: Sequence[_Found], unit_bytes: int) -> list[Unit]:
    """The units of text files: those of a folder together, as many as make `unit_bytes`."""
    units: list[Unit] = []
    for root, group in groupby(sorted(files, key=lambda file: (file.root, file.name)), key=lambda file: file.root):
        pending: list[TextFile] = []
        done = size = 0
        for file in group:
            stat = _stat(file.path)
            if pending and size + stat.st_size > unit_bytes:
                units.append(Unit(root, "text", done, done + len(pending), size, files=tuple(pending)))
                done, pending, size = done + len(pending), [], 0
            pending.append(TextFile(file.name, stat.st_size, stat.st_mtime_ns))
            size += stat.st_size
        units.append(Unit(root, "text", done, done + len(pending), size, files=tuple(pending)))
    return units
