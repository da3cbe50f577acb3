"""A keyed bijection of [0, n) and its inverse, for any n: in what order an epoch visits the rows of a source.

Under `order` in the flow of a token. A Feistel network over the next power of four with cycle walking (Black and
Rogaway, CT-RSA 2002): a value that falls outside [0, n) is sent through again until it falls inside, which keeps the
map a bijection, and so does the way back. Nothing is stored, so a source of 10^11 rows costs what one of ten does.
"""

import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ROUNDS = 6
FACTORS, SHIFT, WRAP = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53), 33, (1 << 64) - 1


def round_keys(key: str) -> list[int]:
    """The Feistel network's round keys: 64 bits each, from BLAKE2b of a text."""
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]


def permute(index: Any, size: int, keys: list[int]) -> Any:
    """A bijection of [0, size) chosen by the keys; takes an int, or an int64 array (any shape)."""
    half = _half(size)
    if isinstance(index, int):
        value = _feistel(index, half, keys)
        while value >= size:
            value = _feistel(value, half, keys)
        return value
    value = _feistel(index.astype("uint64"), half, keys)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], half, keys)
    return value.astype("int64")


def permute_each(index: Any, size: Any, keys: Any) -> Any:
    """`permute` for int64 index (n,), each in a permutation of its own: int64 size (n,), uint64 keys (ROUNDS, n)."""
    import numpy as np  # here, because `crystal plan` must start without it

    bits = np.frexp((size - 1).astype(np.float64))[1]  # exact: no source has 2**53 rows
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    size = size.astype(np.uint64)
    value = _feistel(index.astype(np.uint64), half, keys)
    outside = np.flatnonzero(value >= size)
    while len(outside):
        value[outside] = _feistel(value[outside], half[outside], keys[:, outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64)


def unpermute(value: int, size: int, keys: list[int]) -> int:
    """The index that `permute` sends to `value`."""
    half = _half(size)
    index = _feistel_back(value, half, keys)
    while index >= size:
        index = _feistel_back(index, half, keys)
    return index


def _half(size: int) -> int:
    """Half the bits of the smallest network that holds [0, size)."""
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _feistel(value: Any, half: int, keys: list[int]) -> Any:
    """Permutes [0, 4**half); ints and uint64 arrays (of `half` and of each key, too) give the same values."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (mix(right, key) & mask)
    return (left << half) | right


def _feistel_back(value: int, half: int, keys: list[int]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in reversed(keys):
        left, right = right ^ (mix(left, key) & mask), left
    return (left << half) | right


def mix(value: Any, key: Any) -> Any:
    """A 64-bit finaliser (MurmurHash3's constants) of value and key, ints or uint64 arrays."""
    if isinstance(value, int):
        value = ((value ^ key) * FACTORS[0]) & WRAP
        value = ((value ^ (value >> SHIFT)) * FACTORS[1]) & WRAP
        return value ^ (value >> SHIFT)
    first, second, shift = _as_arrays()
    value = (value ^ key) * first  # arrays wrap around by themselves
    value = (value ^ (value >> shift)) * second
    return value ^ (value >> shift)


@cache
def _as_arrays() -> "list[npt.NDArray[np.uint64]]":
    """The constants of `mix`: with these a short array is done in half the time that Python's ints take."""
    import numpy as np

    return [np.array(number, np.uint64) for number in (*FACTORS, SHIFT)]
