"""The published formats by name: for each a table of its tensors, and what its config.json can say.

`names` holds the machinery that walks a table. A further format is one more module here, and one more line below.
"""

from collections.abc import Mapping
from typing import Any

from crystal_hpc.convert.formats.crystalcoder import CRYSTALCODER
from crystal_hpc.convert.formats.llama import LLAMA
from crystal_hpc.convert.formats.stablelm import STABLELM
from crystal_hpc.convert.names import Format, Shape
from crystal_hpc.errors import CheckpointError

FORMATS: dict[str, Format] = {known.name: known for known in (CRYSTALCODER, LLAMA, STABLELM)}


def by_name(name: str) -> Format:
    """Raises CheckpointError for a name that stands for no format."""
    if name not in FORMATS:
        raise CheckpointError(f"{name}: no such format; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def of_config(config: Mapping[str, Any]) -> Format:
    """The format of a folder, by its config.json's fields. Raises CheckpointError for one that is not known."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        said = "lacks model_type" if kind is None else f"model_type: {kind!r} is no format that can be read"
        raise CheckpointError(f"config.json: {said}; it can be one of {', '.join(FORMATS)}")
    return FORMATS[kind]


def fitting(shape: Shape) -> list[str]:
    """Names of the formats that can express a model."""
    return [name for name, known in FORMATS.items() if not known.reasons_against(shape)]
