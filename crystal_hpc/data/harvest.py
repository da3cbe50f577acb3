"""Makes a demo corpus, prose and code, from the running Python's own installation: no download, no data set needed.

Stands before the first step of a token's way: what it writes is read by `data/corpus`. Prose is Python's help topics,
package descriptions, documentation files and, when those run out, docstrings; code is the standard library's source,
then that of the installed packages. The same installation always gives the same files.
"""

import ast
import contextlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import xxhash

from crystal_hpc.data.corpus import Progress
from crystal_hpc.errors import StoreError
from crystal_hpc.files import PENDING, disk_errors, fsync_path, make_folder

LARGEST_FILE = 1_000_000  # bytes; what is larger is generated more often than written
PROSE_SUFFIXES = (".md", ".rst", ".txt")
LISTS_OF_NAMES = {"top_level.txt", "entry_points.txt", "SOURCES.txt", "requires.txt", "dependency_links.txt"}
LEAST_LETTERS = 0.6  # of a prose document's visible characters: keeps out tables, word lists of numbers and test data
# Parsing does 6 MB/s, so modules that are mostly docstrings go first; those with next to none are left alone.
DOCSTRING_SHARES = (0.5, 0.3, 0.1)
Counts = dict[str, int]  # "documents" and "bytes"
_HOLDERS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def harvest(
    out: Path, bytes_per_source: int = 10_000_000, held_out: float = 0.02, on_progress: Progress | None = None
) -> dict[str, Counts]:
    """Writes `prose.jsonl`, `prose-held-out.jsonl`, `code.jsonl` and `code-held-out.jsonl` into `out`.

    A line is a JSON object with `text`, `source` ("prose" or "code") and `path`, relative to the installation. A source
    stops at the first document that brings its text, training and held-out together, to `bytes_per_source` UTF-8
    bytes. The hash of its text alone puts a document on the held-out side, and no text is taken twice.

    Returns for each file name its `documents` and text `bytes`. Raises StoreError when nothing is found or a number
    makes no sense, DiskError when `out` cannot be written.
    """
    if bytes_per_source < 1 or not 0 <= held_out < 1:
        raise StoreError(
            f"cannot harvest {bytes_per_source} bytes with {held_out:g} held out: ask for at least 1 byte, and for a "
            "held-out share from 0 up to, but not including, 1"
        )
    make_folder(out)
    roots = _roots()
    seen: set[int] = set()
    counts: dict[str, Counts] = {}
    for source, documents in (("prose", _prose(roots)), ("code", _code(roots))):
        taken = _take(documents, bytes_per_source, seen)
        if on_progress:
            taken = _show(taken, f"harvesting {source}", bytes_per_source, on_progress)
        written = _write_source(out, source, taken, held_out)
        if not any(count["documents"] for count in written.values()):
            raise StoreError(f"this Python's installation ({', '.join(map(str, roots.values()))}) holds no {source}")
        counts |= written
    return counts


def _roots() -> dict[str, Path]:
    """The folders to read, by the name that they get in a document's path."""
    paths = sysconfig.get_paths()
    roots = {"lib": Path(paths["stdlib"]), "site-packages": Path(paths["purelib"])}
    if paths["platlib"] != paths["purelib"]:
        roots["platlib"] = Path(paths["platlib"])
    return roots


def _files(roots: dict[str, Path], suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, path) of every file of the right kind, in the order of a hash of its name: a fixed mixture.

    Strings, not Path objects: an installation has tens of thousands of files.
    """
    found = []
    for prefix, root in roots.items():
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in ("__pycache__", "site-packages", "dist-packages")]
            inside = prefix + folder[len(str(root)) :].replace(os.sep, "/")
            for name in names:
                if name.endswith(suffixes) and name not in LISTS_OF_NAMES:
                    found.append((f"{inside}/{name}", os.path.join(folder, name)))
    return sorted(found, key=lambda item: (xxhash.xxh3_64_intdigest(item[0].encode(errors="replace")), item[0]))


def _read_text(path: str) -> str:
    """A file's text, or nothing where it is too large, unreadable or not UTF-8."""
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, "rb") as file:
        data = file.read(LARGEST_FILE + 1)
        return data.decode() if len(data) <= LARGEST_FILE else ""
    return ""


def _prose(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of every prose document, read one at a time: whoever has enough just stops asking."""
    yield from ((f"pydoc-topics/{name}", text) for name, text in sorted(topics.items()))
    for name, path in _files(roots, (*PROSE_SUFFIXES, "METADATA")):
        if "/test/" in name or "/tests/" in name:
            continue  # data to test programs with, seldom prose
        text = _read_text(path)
        if name.endswith("METADATA"):
            text = text.partition("\n\n")[2]  # the long description, after the headers
        if _is_prose(text):
            yield name, text
    modules = _files(roots, (".py",))
    for share in DOCSTRING_SHARES:
        for name, path in modules:
            text = _docstrings(_read_text(path), share)
            if _is_prose(text):
                yield f"{name}#docstrings", text


def _is_prose(text: str) -> bool:
    """Whether the first few thousand visible characters are mostly letters."""
    visible = "".join(text[:5000].split())
    return sum(map(str.isalpha, visible)) > LEAST_LETTERS * len(visible)


def _docstrings(source: str, least_share: float) -> str:
    """The docstrings of a module's source, in order, joined by blank lines; nothing below the least share."""
    quoted = sum(map(len, source.split('"""')[1::2]))
    if quoted <= least_share * len(source):
        return ""
    with warnings.catch_warnings():  # other people's invalid escapes are none of the user's business
        warnings.simplefilter("ignore")
        try:
            return "\n\n".join(_docstrings_below(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ""


def _docstrings_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    for child in node.body:
        if isinstance(child, _HOLDERS):
            yield from _docstrings_below(child)


def _code(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """(name, source) of every module, the standard library's first."""
    for prefix, root in roots.items():
        for name, path in _files({prefix: root}, (".py",)):
            yield name, _read_text(path)


def _take(documents: Iterable[tuple[str, str]], budget: int, seen: set[int]) -> Iterator[tuple[str, str, int, int]]:
    """(name, text, its UTF-8 bytes, 64-bit hash) of documents not seen before, until their bytes reach the budget."""
    taken = 0
    for name, text in documents:
        data = text.encode()
        digest = xxhash.xxh3_128_intdigest(data)
        if text.strip() and digest not in seen:
            seen.add(digest)
            taken += len(data)
            yield name, text, len(data), digest >> 64
        if taken >= budget:
            return


def _show(
    documents: Iterable[tuple[str, str, int, int]], what: str, budget: int, on_progress: Progress
) -> Iterator[tuple[str, str, int, int]]:
    """The same documents, with the bytes gone by reported."""
    done = 0
    for document in documents:
        yield document
        done += document[2]
        on_progress(what, min(done, budget), budget)


def _write_source(
    out: Path, source: str, documents: Iterable[tuple[str, str, int, int]], held_out: float
) -> dict[str, Counts]:
    """Writes a source's two files under temporary names and renames both at the end; returns their counts."""
    names = (f"{source}.jsonl", f"{source}-held-out.jsonl")
    counts: dict[str, Counts] = {name: {"documents": 0, "bytes": 0} for name in names}
    pending = [out / f"{name}.{os.getpid()}{PENDING}" for name in names]
    try:
        with disk_errors(out), contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in pending]
            for path, text, size, digest in documents:
                side = int(digest < held_out * 2**64)
                line = json.dumps({"text": text, "source": source, "path": path}, ensure_ascii=False)
                files[side].write(line.encode(errors="replace") + b"\n")
                counts[names[side]]["documents"] += 1
                counts[names[side]]["bytes"] += size
        with disk_errors(out):
            for temporary, name in zip(pending, names, strict=True):
                fsync_path(temporary)
                os.replace(temporary, out / name)
            fsync_path(out)
    finally:
        for temporary in pending:
            temporary.unlink(missing_ok=True)
    return counts
