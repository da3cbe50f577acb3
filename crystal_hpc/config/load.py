"""From YAML and `a.b=c` overrides to a typed, checked config; every problem is reported at once.

First step of both journeys: `crystal plan`, `crystal submit` and every job start here.
"""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from crystal_hpc.config import check
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)


Lines = dict[tuple[str | int, ...], int]  # the line on which each key of a file stands, by its path


class _Loader(yaml.SafeLoader):
    """YAML whose duplicate keys are errors and whose `1e-9` is a number, as in YAML 1.2."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Reads a run. Raises ConfigError listing everything that is wrong."""
    run, lines = _load(Path(path), Run, overrides)
    _raise([_with_line(problem, lines) for problem in check.run_problems(run)], Path(path))
    return run


def load_cluster(path: Path | str, overrides: Sequence[str] = ()) -> Cluster:
    """Reads a cluster profile. Raises ConfigError listing everything that is wrong."""
    cluster, lines = _load(Path(path), Cluster, overrides)
    _raise([_with_line(problem, lines) for problem in check.cluster_problems(cluster)], Path(path))
    return cluster


def check_layout(run: Run, cluster: Cluster) -> None:
    """Raises ConfigError unless the run fits the cluster's ranks."""
    problems = list(check.layout_problems(run, cluster))
    if problems:
        raise ConfigError(problems, f"run {run.name} on {cluster.name}")


def dump_yaml(config: BaseModel) -> str:
    """A config as YAML that `load_run` or `load_cluster` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _load(path: Path, kind: type[Config], overrides: Sequence[str]) -> tuple[Config, Lines]:
    content, lines = _read_yaml(path)
    for override in overrides:
        _apply_override(content, override)
    try:
        return kind.model_validate(content), lines
    except ValidationError as error:
        _raise([_describe(problem, kind, lines) for problem in error.errors()], path)
        raise AssertionError from error


def _raise(problems: list[str], path: Path) -> None:
    if problems:
        raise ConfigError(problems, str(path))


def _read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The content of a file, and the line on which each key stands."""
    try:
        text = path.read_text(encoding="utf-8")  # as YAML is, whatever the locale says
        loader = _Loader(text)
        node = loader.get_single_node()
        content = loader.construct_document(node) if node is not None else None
    except FileNotFoundError:
        raise ConfigError("no such file", str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", str(path)) from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{line}not valid YAML: {error.problem}", str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {str(error).splitlines()[0]}", str(path)) from error
    except ValueError as error:  # a scalar that is not what its tag says
        raise ConfigError(f"not valid YAML: {error}", str(path)) from error
    if not isinstance(content, dict):
        raise ConfigError("holds no mapping of keys to values", str(path))
    lines: Lines = {}
    _note_lines(node, (), lines)
    return content, lines


def _note_lines(node: Any, path: tuple[str | int, ...], lines: Lines) -> None:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _note_lines(value, (*path, key.value), lines)
            lines[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*path, index), lines)


def _apply_override(content: dict[str, Any], override: str) -> None:
    """`model.layers=2`; a list element by its index or, for phases, by its name: `phases.code.steps=10`."""
    where, equals, text = override.partition("=")
    if not equals or not where:
        raise ConfigError(f"override {override!r}: write key.subkey=value")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    *parents, last = where.split(".")
    target: Any = content
    for part in parents:
        target = _descend(target, part, override)
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} has no keys")


def _descend(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    if not isinstance(target, dict):
        raise ConfigError(f"override {override!r}: there is no key {part!r}")
    return target.setdefault(part, {})


def _index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    choices = ", ".join(str(index if name is None else name) for index, name in enumerate(names))
    raise ConfigError(f"override {override!r}: no element {part!r}; choose from {choices or 'none: the list is empty'}")


def _with_line(problem: str, lines: Lines) -> str:
    """A problem that begins with the path of a key, led by that key's line."""
    parts = problem.partition(":")[0].split(".")
    return f"{_line(tuple(int(part) if part.isdecimal() else part for part in parts), lines)}{problem}"


def _line(location: tuple[str | int, ...], lines: Lines) -> str:
    """`line 3: ` for the innermost part of a location that the file has."""
    number = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    return f"line {number}: " if number else ""


def _describe(problem: Any, kind: type[BaseModel], lines: Lines) -> str:
    """One line for one of pydantic's errors: where, what is wrong, what would be right."""
    location = tuple(part for part in problem["loc"] if part != "[key]")
    where = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        said = f"unknown key{check.did_you_mean(str(location[-1]), _siblings(kind, location[:-1]))}"
    elif problem["type"] == "missing":
        said = "this key is required"
    elif problem["type"] == "value_error":
        said = problem["msg"].removeprefix("Value error, ")
    else:
        said = f"{problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"
    return f"{_line(location, lines)}{where}: {said}"


def _siblings(kind: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys that are valid where the unknown one stood."""
    fields: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        annotation = fields.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        fields = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(fields.model_fields)
