"""Reads the fields of somebody's config.json into ours, and gathers what our model cannot do, field by field.

Formats ask for each field they know; the one error, raised by `shape`, tells of all of them. Fields that no
format asks for (dropout, caching, token ids) say nothing about what a trained model computes.
"""

import math
from collections.abc import Mapping
from typing import Any

from crystal_hpc.config.schema import Model, Mup
from crystal_hpc.convert.names import Shape
from crystal_hpc.errors import CheckpointError


class Fields:
    """A config.json, and the problems found in it so far."""

    def __init__(self, config: Mapping[str, Any], title: str) -> None:
        self.config = config
        self.title = title
        self.problems: list[str] = []
        if config.get("quantization_config") is not None:
            self.problems.append("quantization_config: only weights that are not quantised can be read")
        self.rotary = self._rotary()

    def _rotary(self) -> Mapping[str, Any]:
        """The fields about rotary positions: newer Transformers keep them in `rope_parameters`, older at the top level.

        A problem where anything but the plain frequencies is asked for.
        """
        found = self.config
        for key in ("rope_parameters", "rope_scaling"):
            inside = self.config.get(key)
            if isinstance(inside, dict) and not any(isinstance(value, dict) for value in inside.values()):
                kind = inside.get("rope_type", inside.get("type", "default"))
                found = {**found, **inside}
            else:  # missing, or one for each kind of layer
                kind = "default" if inside is None else inside
            if kind != "default":
                self.problems.append(f"{key}: {inside!r}, and our model can only do the rope_type default")
        return found

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; a problem where it is missing without a default, or less than `least`."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            said = "is missing" if value is None else f"{value!r} is no whole number of at least {least}"
            self.problems.append(f"{key}: {said}")
            return 1
        return value

    def number(
        self, key: str, default: float, within: Mapping[str, Any] | None = None, may_be_zero: bool = False
    ) -> float:
        """A finite number above zero, of the config or of a part of it."""
        value = (self.config if within is None else within).get(key)
        if value is None or (may_be_zero and value == 0):
            return default if value is None else 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problems.append(f"{key}: {value!r} is no number above zero")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key}: {value!r} is neither true nor false")
            return default
        return default if value is None else value

    def only(self, key: str, *allowed: Any, why: str = "") -> None:
        """A field that must have one of these values, or be missing where the first is the format's default."""
        value = self.config.get(key)
        if value is not None and not any(value == one and type(value) is type(one) for one in allowed):
            can = " or ".join(map(repr, allowed))
            self.problems.append(f"{key}: {value!r}, and our model can only do {can}" + (f" ({why})" if why else ""))

    def head_width(self, hidden: int, heads: int, key: str) -> int:
        """Width of a head; a problem where the heads do not share the hidden width evenly."""
        if hidden % heads:
            self.problems.append(f"{key}: {heads} does not divide the hidden width of {hidden}")
        return max(hidden // heads, 1)

    def rotary_fraction(self, key: str, rotated: int, width: int) -> float:
        """The share of a head that gives back exactly `rotated` dimensions; a problem where they are odd."""
        if rotated % 2 or rotated > width:
            self.problems.append(f"{key}: {rotated} of {width} dimensions cannot be turned in pairs")
            return 1.0
        fraction = rotated / width
        return fraction if int(width * fraction) == rotated else math.nextafter(fraction, 1)

    def shape(self, mup: Mup | None = None, **model: Any) -> Shape:
        """The model of these keys. Raises CheckpointError, in one line, for all problems found."""
        if self.problems:
            problems = "; ".join(self.problems)
            raise CheckpointError(f"config.json: not a {self.title} model that can be read here: {problems}")
        return Shape(Model(**model), mup)
