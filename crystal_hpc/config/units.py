"""Numbers as people write them: `1.3T` tokens, `30min`."""

import re
from fractions import Fraction
from typing import Any

NUMBER = r"[0-9]+(?:\.[0-9]+)?"
COUNT = rf"{NUMBER}\s*[kMBT]?"
DURATION = rf"{NUMBER}\s*(?:s|min|h|d)"

_COUNT = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def parse_count(value: Any) -> Any:
    """`345B` or `1.5M` as an int; anything but a string is left for the type check."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(rf"\s*({NUMBER})\s*([kMBT]?)\s*", value)
    if match is None:
        raise ValueError(f"{value!r} is not a count; write for example 500k, 1.5M, 345B or 1.3T")
    return round(Fraction(match[1]) * _COUNT[match[2]])


def parse_seconds(value: Any) -> Any:
    """`90s`, `30min`, `1.5h` or `2d` as seconds; a bare number has no unit and is refused."""
    match = re.fullmatch(rf"\s*({NUMBER})\s*(s|min|h|d)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a duration; write for example 90s, 30min, 24h or 2d")
    return round(Fraction(match[1]) * _SECONDS[match[2]])


def format_count(value: float) -> str:
    """A count in three significant digits and the unit that suits it: 1.39T, 4.33M, 960."""
    for unit in ("T", "B", "M", "k"):
        if value >= 0.9995 * _COUNT[unit]:  # from here on three digits round up to this unit
            return f"{value / _COUNT[unit]:.3g}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: 2d 3h, 1h 05min, 4min 10s, 3.2s."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    for large, small, name, subname in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= large:
            return f"{int(seconds // large)}{name} {int(seconds % large // small):02d}{subname}"
    raise AssertionError(seconds)


def format_bytes(count: float) -> str:
    """A size in three significant digits and a decimal unit, as disks are sold: 92.1 GB, 640 bytes."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
