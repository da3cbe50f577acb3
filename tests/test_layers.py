"""The rooms of the package stay habitable: imports go one way, login nodes need no torch, files stay small."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "crystal_hpc"
# From the bottom up; those in one line may import each other (but not in a circle).
LAYERS = [
    {"errors"},
    {"files", "comm", "log", "progress", "provenance"},
    {"config"},
    {"data"},
    {"model"},
    {"train"},
    {"convert"},
    {"jobs", "report"},
    {"cli", "cli_checkpoints", "cli_data", "cli_proof", "cli_stage", "demo", "drill", "mup_check"},
]
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80

# What a login node needs; the modules of `jobs` that are not here run in the job.
WITHOUT_TORCH = [
    "cli",
    "config",
    "config.load",
    "config.describe",
    "jobs.submit",
    "jobs.journal",
    "jobs.status",
    "jobs.request",
    "jobs.doctor",
    "jobs.probe",
    "jobs.batch",
    "report.plan",
    "report.footprint",
    "report.checkpoints",
    "report.inspection",
    "cli_checkpoints",
    "train.generations",
    "train.retention",
]
DATA_WITH_TORCH = {"data.batches"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without `crystal_hpc.`; packages under their own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports below a node, inside functions too, less those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from import_statements(other)
        else:
            yield from import_statements(child)


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    path = modules()[name]
    package = ["crystal_hpc", *name.split(".")] if name else ["crystal_hpc"]
    if path.name != "__init__.py":
        package.pop()
    found = set()
    for statement in import_statements(tree(path)):
        if isinstance(statement, ast.Import):
            targets = [alias.name for alias in statement.names]
        else:
            base = package[: len(package) - statement.level + 1] if statement.level else []
            source = ".".join([*base, *([statement.module] if statement.module else [])])
            targets = [f"{source}.{alias.name}" for alias in statement.names]
        for target in targets:
            first, _, rest = target.partition(".")
            if first == "crystal_hpc":
                # `from crystal_hpc.a import b`: b is a module, or something in a.
                found.add(rest if rest in modules() else rest.rpartition(".")[0])
    return found - {"", name}


def layer(name: str) -> int:
    room = name.partition(".")[0]
    (number,) = [number for number, rooms in enumerate(LAYERS) if room in rooms]
    return number


def test_every_room_has_its_layer() -> None:
    known = set().union(*LAYERS)
    assert {name.partition(".")[0] for name in modules() if name} <= known


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_go_one_way(name: str) -> None:
    upward = {other for other in imported(name) if other in modules() and layer(other) > layer(name)}
    assert upward == set(), f"{name} imports from a higher layer"


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter({name: imported(name) for name in modules()}).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_the_bottom_imports_nothing_of_ours() -> None:
    assert imported("errors") == set()
    assert imported("") == set()


def torch_after_importing(names: list[str]) -> str:
    """Imports modules one after the other in a fresh process: the first that brings torch, or nothing."""
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        print(name)
        break
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *(f"crystal_hpc.{name}" for name in names)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_login_node_needs_no_torch() -> None:
    names = [name for name in WITHOUT_TORCH if name in modules()]
    assert len(names) >= 7
    assert torch_after_importing(names) == ""


def test_data_needs_no_torch_but_for_batches() -> None:
    names = [name for name in modules() if name.startswith("data") and name not in DATA_WITH_TORCH]
    assert len(names) > 5
    assert torch_after_importing(names) == ""


@pytest.mark.parametrize("folder", ["crystal_hpc", "tools", "benchmarks", "slurm", "tests"])
def test_no_file_and_no_function_is_too_long(folder: str) -> None:
    too_long = []
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert too_long == []


def test_the_layers_are_those_of_the_design() -> None:
    order = ["errors", "files", "config", "data", "model", "train", "convert", "jobs", "cli"]
    assert all(layer(below) < layer(above) for below, above in pairwise(order))
