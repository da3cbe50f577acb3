"""Bytes of corpus files as they are unpacked, and the lines in them, in constant memory.

Part of the first step of a token's way, below `corpus`. A file is read in blocks of BLOCK bytes; a line is held only
until it is complete, and one that grows beyond the limit is let go while its end is sought.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, cast

import zstandard

BLOCK = 1 << 20  # bytes read, or unpacked, at a time
BOM = b"\xef\xbb\xbf"
_GZIP_INPUT = 1 << 16  # bytes given to zlib at a time: what it cannot unpack at once is copied
_LARGEST_WINDOW = 1 << 31  # the most that `zstd --long` can write
_HEAD = 1 << 10  # bytes that are kept of a line that is too long


class Damaged(Exception):
    """A compressed stream that is cut off or broken; the message says which."""


def plain_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """A file's bytes from where it stands, unchanged."""
    return iter(lambda: file.read(BLOCK), b"")


def gzip_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The unpacked bytes of all members of a gzip file. Raises Damaged."""
    engine = zlib.decompressobj(zlib.MAX_WBITS | 16)
    begun = False  # whether the member has begun: between two the file may end
    try:
        while data := engine.unconsumed_tail or engine.unused_data or file.read(_GZIP_INPUT):
            if engine.eof:
                engine, begun = zlib.decompressobj(zlib.MAX_WBITS | 16), False
            if not begun:
                data = data.lstrip(b"\0")  # padding between members, as tapes have it
                begun = bool(data)
            if block := engine.decompress(data, BLOCK):
                yield block
    except zlib.error as error:
        raise Damaged(f"is damaged ({error})") from error
    if begun and not engine.eof:
        raise Damaged("is cut off")


def zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The unpacked bytes of all frames of a zstd file. Raises Damaged."""
    ended = _WithEnd(file)
    held = b""
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).stream_reader(
            cast("IO[bytes]", ended), read_size=BLOCK, read_across_frames=True
        )
        while block := reader.read(BLOCK):
            held += block
            if whole := held[: -len(ended.mark)]:
                yield whole
            held = held[-len(ended.mark) :]
    except zstandard.ZstdError as error:
        raise Damaged("is cut off" if ended.reached else f"is damaged ({error})") from error
    if held != ended.mark:
        raise Damaged("is cut off")


class _WithEnd:
    """A zstd file with one more frame behind its end.

    The library does not tell a stream that ends inside a frame from one that ends after it. With one more frame it
    shows: that frame's content, `mark`, comes out last if the file is whole, and not otherwise. The mark repeats
    random bytes, so that it stands nowhere in the frame as it is and is not met by chance.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.mark = os.urandom(32) * 4
        self.reached = False

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        if data or self.reached:
            return data
        self.reached = True
        return zstandard.ZstdCompressor().compress(self.mark)


BLOCKS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "": plain_blocks,
    "gzip": gzip_blocks,
    "zstd": zstd_blocks,
}


def split_lines(blocks: Iterable[bytes], longest: int) -> Iterator[tuple[int, bytes | bytearray]]:
    """(length, line) of every line, both without the newline; the last line may have none.

    Of a line with more than `longest` bytes only the beginning is given; its length tells.
    """
    length, begun = 0, bytearray()  # of the line that the blocks so far have begun and not ended
    for block in blocks:
        first, *others = block.split(b"\n")
        length += len(first)
        if length <= longest:
            begun += first
        else:
            begun = (begun[:_HEAD] + first[:_HEAD])[:_HEAD]
        if not others:
            continue
        yield length, begun
        *whole, last = others
        for line in whole:
            yield len(line), line
        length, begun = len(last), bytearray(last)
    if length:
        yield length, begun
