"""The JSON Schema of a config file, with which editors complete keys, explain them and mark mistakes.

Beside the journeys: only `crystal config schema` comes here. Pydantic gives the schema; the explanations are the
docstrings under the fields, read from the source here rather than by pydantic, which would do it at every start.
"""

import ast
import inspect
import sys
from typing import Any

from pydantic import BaseModel

from crystal_hpc.config import compute


def json_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a config model; every documented field carries its docstring as description."""
    schema = kind.model_json_schema()
    docstrings = _field_docstrings(sys.modules[kind.__module__]) | _field_docstrings(compute)
    for name, model in {kind.__name__: schema, **schema.get("$defs", {})}.items():
        for field, property_ in model.get("properties", {}).items():
            if said := docstrings.get((name, field)):
                property_["description"] = said
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _field_docstrings(module: Any) -> dict[tuple[str, str], str]:
    """(class, field) -> the string that stands under the field, on one line."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[node.name, name] = " ".join(said.split())
    return found
