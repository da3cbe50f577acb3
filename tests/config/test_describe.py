"""The schema that editors read explains every key and accepts what `load` accepts."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from crystal_hpc.config.describe import json_schema
from crystal_hpc.config.schema import Cluster, Count, Run, Seconds


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, model in {schema["title"]: schema, **schema.get("$defs", {})}.items():
        for field, content in model["properties"].items():
            yield f"{name}.{field}", content


@pytest.mark.parametrize("kind", [Run, Cluster])
def test_every_key_is_explained(kind: type[BaseModel]) -> None:
    unexplained = [name for name, field in fields(json_schema(kind)) if not field.get("description")]
    assert unexplained == []


@pytest.mark.parametrize("kind", [Run, Cluster])
def test_no_key_is_open_to_others(kind: type[BaseModel]) -> None:
    schema = json_schema(kind)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert all(model["additionalProperties"] is False for model in [schema, *schema.get("$defs", {}).values()])
    assert json.loads(json.dumps(schema)) == schema


def test_an_explanation_is_the_docstring_under_the_key() -> None:
    found = dict(fields(json_schema(Run)))
    assert found["Phase.batch_size"]["description"] == "Sequences in a step, over all ranks."
    assert found["Run.model"]["description"] == "The architecture."
    assert found["Mup.base_hidden"]["exclusiveMinimum"] == 0


def test_a_count_may_be_a_number_or_have_a_unit() -> None:
    number, text, null = dict(fields(json_schema(Run)))["Phase.tokens"]["anyOf"]
    assert (number["type"], text["type"], null["type"]) == ("integer", "string", "null")


@pytest.mark.parametrize(
    "text", ["1.3T", "960", "5 k", "30min", "1.5h", "90s", "2d", "1.", "-3", "90 sec", "1e9", "1,5M", "x", ""]
)
def test_the_schema_accepts_the_same_units_as_the_loader(text: str) -> None:
    found = dict(fields(json_schema(Run))) | dict(fields(json_schema(Cluster)))
    patterns = {
        Count: found["Phase.tokens"]["anyOf"][1]["pattern"],
        Seconds: found["Cluster.time_limit"]["pattern"],
    }
    for kind, pattern in patterns.items():
        try:
            TypeAdapter(kind).validate_python(text)
        except ValidationError:
            assert not re.search(pattern, text), kind
        else:
            assert re.search(pattern, text), kind


def test_a_default_is_one_that_the_loader_accepts() -> None:
    default = dict(fields(json_schema(Cluster)))["Cluster.signal_delay"]["default"]
    cluster = {"name": "c", "executor": "local", "ranks_per_node": 1, "time_limit": "1h"}
    assert Cluster.model_validate(cluster | {"signal_delay": default}) == Cluster.model_validate(cluster)
