"""The bytes that token ids stand for, many at a time; `data/fim` reads the text of a row with it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]


class Spelling:
    """`Tokenizer.token_bytes` laid out so that numpy can spell some hundred million bytes a second."""

    def __init__(self, token_bytes: Sequence[bytes | None]) -> None:
        """`known`: bool (vocabulary,), False for special tokens; those are spelled as nothing."""
        self.known = np.array([piece is not None for piece in token_bytes], bool)
        self._lengths = np.array([len(piece or b"") for piece in token_bytes], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._bytes = np.frombuffer(b"".join(piece or b"" for piece in token_bytes), np.uint8)

    def spell(self, ids: Ints) -> tuple[bytes, npt.NDArray[np.int64]]:
        """The bytes of ids (n,) one after another, and where those of each begin: int64 (n + 1,)."""
        lengths = self._lengths[ids]
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.arange(offsets[-1])
        places += np.repeat(self._starts[ids] - offsets[:-1], lengths)
        return self._bytes[places].tobytes(), offsets
