"""The four tokens of fill-in-the-middle, found in a tokenizer by name; for planning too, so without heavy imports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from crystal_hpc.data.catalog import read_tokenizer_json
from crystal_hpc.errors import StoreError


class Sentinels(NamedTuple):
    """Their ids."""

    prefix: int
    middle: int
    suffix: int
    pad: int


def find_sentinels(id_of: Callable[[str], int | None], where: str) -> Sentinels:
    """Crystal's release spells them `<|fim_prefix|>`, its data preparation and StarCoder `<fim_prefix>`.

    Raises StoreError with all that are missing; `where` names the tokenizer in it.
    """
    found = {name: _first(id_of, (f"<|fim_{name}|>", f"<fim_{name}>")) for name in Sentinels._fields}
    missing = ", ".join(f"<|fim_{name}|>" for name, token in found.items() if token is None)
    if missing:
        raise StoreError(
            f"{where}: the tokenizer has no {missing} (nor the same without bars), which fim needs; "
            "add them to its added_tokens, or take fim out of the phases"
        )
    return Sentinels(**{name: token for name, token in found.items() if token is not None})


def read_sentinels(path: Path) -> Sentinels:
    """Those of a tokenizer.json, or of the one in a folder. Raises StoreError."""
    return find_sentinels(_names(read_tokenizer_json(path)).get, str(path))


def _first(id_of: Callable[[str], int | None], names: tuple[str, ...]) -> int | None:
    return next((token for token in map(id_of, names) if token is not None), None)


def _names(value: dict[str, Any]) -> dict[str, int]:
    """The id of every name in a tokenizer.json's content."""
    vocab = value["model"]["vocab"]
    known = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
    return known | {token["content"]: token["id"] for token in value["added_tokens"]}
