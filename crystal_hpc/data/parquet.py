"""Rows of Parquet files, a few at a time.

Part of the first step of a token's way, below `corpus`. Only the columns that are asked for are read, in batches of
about BATCH_BYTES, a page at a time from disk. pyarrow is an extra and is loaded only when there is Parquet to read.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crystal_hpc.data.records import printable
from crystal_hpc.errors import StoreError

Row = dict[str, Any]  # by column
BATCH_BYTES = 4 << 20  # of text
_READ_AHEAD = 1 << 20  # bytes of a column that are fetched at a time


def row_group_ranges(path: Path, unit_bytes: int) -> list[tuple[int, int, int]]:
    """(first row group, the one after the last, bytes on disk) of parts of a file with about `unit_bytes` each."""
    ranges: list[tuple[int, int, int]] = []
    with _opened(path) as file:
        for group in range(file.metadata.num_row_groups):
            part = file.metadata.row_group(group)
            size = sum(part.column(number).total_compressed_size for number in range(part.num_columns))
            if ranges and ranges[-1][2] + size <= unit_bytes:
                ranges[-1] = (ranges[-1][0], group + 1, ranges[-1][2] + size)
            else:
                ranges.append((group, group + 1, size))
    return ranges


def rows(path: Path, start: int, stop: int, text: str, others: Sequence[str]) -> Iterator[tuple[int, int, Row]]:
    """(number in the file, rows in these groups, row) of the rows in row groups start..stop-1.

    A row is a dict with the text as bytes, and with those of the `others` that the file has. Raises StoreError for a
    damaged file, and for one without a column `text` of strings.
    """
    with _opened(path) as file:
        columns = _columns(path, file.schema_arrow, text, others)
        groups = range(start, stop)
        number = sum(file.metadata.row_group(group).num_rows for group in range(start))
        total = sum(file.metadata.row_group(group).num_rows for group in groups)
        size = _batch_rows(file.metadata, groups, text)
        for batch in file.iter_batches(size, list(groups), columns, use_threads=False):
            for row in _as_bytes(batch, text):
                yield number, total, row
                number += 1


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; what goes wrong with it is a StoreError."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise StoreError(
            f"{printable(str(path))}: reading Parquet needs pyarrow; install it with pip install 'crystal-hpc[parquet]'"
        ) from None
    try:
        # Without pre_buffer a column comes page by page, not a whole row group at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        said = printable(str(error).partition("\n")[0])
        raise StoreError(f"{printable(str(path))}: damaged, or not Parquet ({said}); fetch it again") from error


def _columns(path: Path, schema: Any, text: str, others: Sequence[str]) -> list[str]:
    """The columns to read. Raises StoreError where `text` is not one of strings."""
    import pyarrow.types as types

    if text not in schema.names:
        known = ", ".join(printable(name) for name in schema.names)
        raise StoreError(f"{printable(str(path))}: no column {text!r} for the text; the columns are {known}")
    kind = schema.field(text).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_null(inner) or any(word in str(inner) for word in ("string", "binary"))) or types.is_nested(inner):
        raise StoreError(f"{printable(str(path))}: column {text!r} holds {kind}, not text; name another for the text")
    plain = [name for name in others if name in schema.names and not types.is_nested(schema.field(name).type)]
    return list(dict.fromkeys([text, *plain]))


def _batch_rows(metadata: Any, groups: range, text: str) -> int:
    """How many rows hold about BATCH_BYTES of text."""
    size = count = 0
    for group in groups:
        part = metadata.row_group(group)
        count += part.num_rows
        for number in range(part.num_columns):
            column = part.column(number)
            size += column.total_uncompressed_size if column.path_in_schema == text else 0
    return max(1, min(4096, BATCH_BYTES * count // max(1, size)))


def _as_bytes(batch: Any, text: str) -> Iterator[Row]:
    """The rows of a batch with strings as bytes: Parquet promises UTF-8 but nobody has checked it."""
    import pyarrow
    import pyarrow.types as types

    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        is_text = any(word in str(kind) for word in ("string", "binary")) or (name == text and types.is_null(kind))
        columns.append(column.cast(kind).cast(pyarrow.large_binary()) if is_text else column)
    values = [column.to_pylist() for column in columns]
    for row in zip(*values, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))
