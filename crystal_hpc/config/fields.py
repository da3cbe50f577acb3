"""The kinds of value that the keys of a config take, and what makes a section strict."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from crystal_hpc.config.units import COUNT, DURATION, parse_count, parse_seconds

Count = Annotated[
    int,
    BeforeValidator(parse_count),
    Field(gt=0),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": f"^{COUNT}$"}]}
    ),
]
Seconds = Annotated[
    int,
    BeforeValidator(parse_seconds),
    Field(gt=0),
    WithJsonSchema({"type": "string", "pattern": f"^{DURATION}$"}),
    PlainSerializer(lambda seconds: f"{seconds}s", return_type=str, when_used="json"),
]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A name becomes a folder, a job name and a word in a shell line.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Strict(BaseModel):
    """Immutable; no key beyond those declared; no silent change of type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True, allow_inf_nan=False)
