"""`tools/inspect_checkpoint.py` and `tools/compare_checkpoints.py`: what they say of real files, and of wrong ones."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_generations import EMBEDDING, Tensors, changed, make_generation, tensors, unstacked, write_tensors
from ranks import Order, Ranks, look_in_step
from safetensors.torch import save_file

from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import compare as module
from crystal_hpc.convert.compare import Comparison, compare, describe
from crystal_hpc.errors import CheckpointError
from crystal_hpc.report.inspection import inspect
from crystal_hpc.train.distcp import Chunk, FileWriter, write_index
from crystal_hpc.train.generations import keep
from crystal_hpc.train.state import Position

REPOSITORY = Path(__file__).parents[2]
GATE = "decoder.layers.mlp.linear_fc1.weight"
MOMENT = f"optimizer.state.exp_avg.{GATE}"


@pytest.fixture
def run(tiny_config: dict[str, Any], write_config: Callable[..., Path]) -> Run:
    return load_run(write_config(tiny_config))


@pytest.fixture
def generation(tmp_path: Path, run: Run) -> Path:
    return make_generation(tmp_path / "run", run, Position(1, 2), "asked for", verified=True)


def tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs a tool, which must not end with a traceback."""
    program = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *(str(word) for word in words)]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=variables, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_inspect_says_what_a_checkpoint_is(generation: Path) -> None:
    keep(generation, "before-lr-change")
    done = tool("inspect_checkpoint", generation, "--tensors", "--optimizer")
    assert done.returncode == 0, done.stderr
    for said in (
        "phase code, step 2, 896 tokens", "training, fp32; optimizer: Adam, 2 steps", "(asked for)",
        "ranks 2, tensor 1", "4 tensors, 456 parameters", "by a test", "as before-lr-change", "prose 8 samples",
    ):  # fmt: skip
        assert said in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    norm = f"{float(tensors()[EMBEDDING].double().norm()):.6g}"
    assert [EMBEDDING, "24", "x", "8", "float32", "norm", norm] in lines
    assert [MOMENT, "2", "x", "16", "x", "8", "float32", "2", "chunks"] in lines
    assert not any(line and line[0] == GATE for line in lines)


def test_inspect_without_the_optimizer_takes_no_torch_and_opens_no_tensor(generation: Path) -> None:
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (generation / name).unlink()
    program = """
import runpy, sys
sys.argv[0] = sys.argv.pop(1)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("torch" in sys.modules, end.code)
"""
    path = REPOSITORY / "tools" / "inspect_checkpoint.py"
    words = [sys.executable, "-c", program, str(path), str(generation), "--tensors"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr


def test_inspect_as_json_has_the_manifest_and_what_lies_beside_it(generation: Path) -> None:
    said = json.loads(tool("inspect_checkpoint", generation, "--json", "--optimizer").stdout)
    assert (said["phase"], said["step"], said["kept"], said["verified"]["by"]) == ("code", 2, None, "a test")
    assert said["tensors"][EMBEDDING]["shape"] == [24, 8] and len(said["files"]) == 5
    assert said["keys"][MOMENT] == {"shape": [2, 16, 8], "dtype": "float32", "chunks": 2}


def test_inspect_says_what_it_was_given_instead(tmp_path: Path, generation: Path) -> None:
    published, foreign, damaged = tmp_path / "published", tmp_path / "foreign", generation
    published.mkdir()
    save_file({"x": torch.ones(2)}, published / "model.safetensors")
    write_tensors(foreign, tensors())
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (damaged / "manifest.json").write_text("{")
    expected = {
        published: "is a Hugging Face folder, not a checkpoint of a run",
        foreign: "is a distributed checkpoint without manifest.json",
        tmp_path / "nowhere": "no such folder",
        tmp_path / "file": "is a file, not a checkpoint",
        tmp_path / "empty": "is no checkpoint: it has no manifest.json",
        tmp_path: "is a run folder; list its checkpoints with: crystal checkpoints",
        damaged: "manifest.json: damaged",
    }
    for folder, said in expected.items():
        done = tool("inspect_checkpoint", folder)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {folder}") and said in done.stderr and done.stderr.count("\n") == 1


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes tensors as so many ranks would, into a new folder."""
    count = 0

    def write(made: Tensors | None = None, ranks: int = 2) -> Path:
        nonlocal count
        count += 1
        write_tensors(tmp_path / f"made-{count}", tensors() if made is None else made, ranks)
        return tmp_path / f"made-{count}"

    return write


def with_change(key: str, *index: int, to: float) -> Tensors:
    made = tensors()
    made[key][index] = to
    return made


@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("box", [100, 1 << 28])
def test_the_same_numbers_are_the_same_whatever_layout_wrote_them(
    make: Make, ranks: int, box: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BOX", box)
    found = compare(make(), make(ranks=ranks), optimizer=True)
    assert found == Comparison(same=12, numbers=3 * 456)
    assert describe(found) == "same: 12 tensors, 1,368 numbers, bit for bit"


@pytest.mark.parametrize("box", [40, 1 << 28])
@pytest.mark.parametrize("piece", [3, 1 << 22])
def test_a_difference_is_found_at_its_place(make: Make, box: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BOX", box)
    monkeypatch.setattr(module, "_PIECE", piece)
    made = tensors()
    before = float(made[GATE][1, 5, 6])
    made[GATE][1, 5, 6] += 0.25
    made[GATE][1, 15, 0] += 0.5
    found = compare(make(), make(made, ranks=4))
    (one,) = found.differences
    assert (one.name, one.first, one.count) == ("decoder.layers.1.mlp.linear_fc1.weight", (5, 6), 2)
    assert one.values == (before, float(made[GATE][1, 5, 6])) and one.largest == pytest.approx(0.5)
    first, summary = describe(found).splitlines()
    assert "(layer 1), [16, 8] float32: 2 of 128 numbers differ, the first at [5, 6]: " in first
    assert summary == "different: tensors: 1 differ, 3 are the same"


def test_the_first_difference_is_that_which_comes_first_in_the_model(make: Make) -> None:
    made = tensors()
    for key in ("decoder.final_layernorm.weight", GATE, EMBEDDING, MOMENT):
        made[key] += 1
    found = compare(make(), make(made), optimizer=True)
    layers = [f"decoder.layers.{n}.mlp.linear_fc1.weight" for n in range(2)]
    moments = [f"optimizer.state.exp_avg.{name}" for name in layers]
    names = [one.name for one in found.differences]
    assert names == [EMBEDDING, *layers, "decoder.final_layernorm.weight", *moments]
    said = describe(found).splitlines()
    assert said[0].startswith(f"{EMBEDDING}, ") and said[1] == "... and 5 more tensors (--all names them)"
    assert len(describe(found, every=True).splitlines()) == 7


def test_the_optimizer_is_compared_on_demand_alone(make: Make) -> None:
    a, b = make(), make(with_change(MOMENT, 0, 0, 0, to=7))
    assert compare(a, b).equal
    assert [one.values[1] for one in compare(a, b, optimizer=True).differences] == [7.0]


def test_what_is_on_one_side_only_or_of_another_kind_is_named(make: Make) -> None:
    less, other = tensors(), tensors()
    del less["decoder.final_layernorm.weight"]
    other[EMBEDDING] = other[EMBEDDING].bfloat16()
    other[GATE] = torch.cat([other[GATE]] * 2, dim=2)
    found = compare(make(less), make(other))
    assert found.only_b == ["decoder.final_layernorm.weight"] and found.only_a == []
    assert found.unlike[0] == f"{EMBEDDING}: [24, 8] float32 and [24, 8] bfloat16"
    assert "layers.0.mlp.linear_fc1.weight: [16, 8] float32 and [16, 16] float32" in found.unlike[1]
    said = describe(found).splitlines()
    assert said[0] == "only in the second: decoder.final_layernorm.weight"
    assert said[-1] == "different: tensors: 3 are of another shape or dtype, 1 are only in the second"
    found = compare(make(), make(less))
    assert found.only_a == ["decoder.final_layernorm.weight"] and not found.equal


def test_more_layers_on_one_side_are_named_by_number(make: Make) -> None:
    more = tensors()
    more[GATE] = torch.cat([more[GATE], more[GATE][:1]])
    found = compare(make(), make(more))
    assert found.only_b == ["decoder.layers.2.mlp.linear_fc1.weight"] and found.same == 4


def test_a_tolerance_lets_small_differences_pass_but_never_what_is_no_number(make: Make) -> None:
    a = make()
    near = make(with_change(GATE, 0, 0, 0, to=float(tensors()[GATE][0, 0, 0]) + 1e-4))
    assert not compare(a, near).equal and not compare(a, near, tolerance=1e-5).equal
    assert compare(a, near, tolerance=1e-3).equal
    assert describe(compare(a, near, tolerance=1e-3), tolerance=1e-3).endswith("numbers, within 0.001")
    nan = make(with_change(GATE, 0, 0, 0, to=math.nan))
    (one,) = compare(a, nan, tolerance=1e9).differences
    assert one.count == 1 and math.isnan(one.largest)
    assert compare(nan, nan).equal and compare(nan, nan, tolerance=1.0).equal
    zeros = [make({EMBEDDING: torch.full((4, 2), zero)}) for zero in (0.0, -0.0)]
    assert not compare(*zeros).equal and compare(*zeros, tolerance=1e-30).equal


def test_layers_under_keys_of_their_own_are_the_same_as_a_stack(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "apart"
    folder.mkdir()
    writer = FileWriter(folder / "__0_0.distcp")
    for key, tensor in unstacked(tensors()).items():
        writer.add(Chunk(key, tuple(tensor.shape), (0,) * tensor.ndim, tensor.contiguous()))
    write_index(folder, writer.close().placed)
    assert compare(make(), folder).equal


def test_folders_of_hugging_face_are_compared_too(tmp_path: Path) -> None:
    def publish(name: str, *shards: Tensors) -> Path:
        (tmp_path / name).mkdir()
        for number, shard in enumerate(shards):
            save_file(shard, tmp_path / name / f"model-{number}.safetensors")
        return tmp_path / name

    first = {"transformer.wte.weight": torch.arange(12.0).reshape(6, 2), "scale": torch.tensor(3.0)}
    second = {"transformer.h.10.ln_1.bias": torch.ones(3).bfloat16()}
    other = {"transformer.h.10.ln_1.bias": torch.tensor([1, 1, 2]).bfloat16()}
    whole = publish("whole", first | second)
    assert compare(whole, publish("sharded", first, second)) == Comparison(same=3, numbers=16)
    (one,) = compare(whole, publish("other", first, other)).differences
    assert (one.first, one.values) == ((2,), (1.0, 2.0)) and "(layer 10), [3] bfloat16" in str(one)


def test_runs_under_other_layouts_have_the_same_tensors_and_nearly_the_same_numbers(
    one: Ranks, two: Ranks, new_run: Callable[..., Path]
) -> None:
    alone, place = new_run("alone"), "checkpoints/prose/step_00000002"
    one.train(Order(alone, signal_at_look=look_in_step(2)))
    for name, setting in (("tp", "parallel.tensor=2"), ("dp", "parallel.distributed_optimizer=true")):
        shared = new_run(name, setting)
        two.train(Order(shared, signal_at_look=look_in_step(2)))
        found = compare(alone / place, shared / place, optimizer=True)
        assert not (found.only_a or found.only_b or found.unlike), name
        assert 0 < max(one.largest for one in found.differences) < 1e-4
        assert compare(alone / place, shared / place, tolerance=1e-4, optimizer=True).equal
        manifest, notes = inspect(shared / place, optimizer=True)
        model = load_run(shared / "run.yaml").model
        assert sum(math.prod(tensor.shape) for tensor in manifest.tensors.values()) == derive.parameters(model)
        moments = [key for key in notes["keys"] if key.startswith("optimizer.state.exp_avg.")]
        assert sum(math.prod(notes["keys"][key]["shape"]) for key in moments) == derive.parameters(model)


def test_the_tool_ends_with_0_1_or_2(make: Make, tmp_path: Path) -> None:
    a, b = make(), make(with_change(GATE, 1, 2, 3, to=9))
    same = tool("compare_checkpoints", a, a, "--optimizer")
    assert (same.returncode, same.stdout) == (0, "same: 12 tensors, 1,368 numbers, bit for bit\n")
    different = tool("compare_checkpoints", a, b, "--all")
    assert different.returncode == 1 and "linear_fc1.weight (layer 1), " in different.stdout
    mistaken = tool("compare_checkpoints", a, tmp_path / "nowhere")
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
    assert mistaken.stderr == f"error: {tmp_path / 'nowhere'}: no such folder\n"


def test_folders_that_cannot_be_compared_are_refused(make: Make, tmp_path: Path) -> None:
    a = make()
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither a checkpoint .* nor a Hugging Face folder"):
        compare(a, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="compare two of one kind"):
        compare(a, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="hold no tensors of a model"):
        compare(*[make({MOMENT: torch.ones(2, 4, 4)})] * 2)
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(CheckpointError, match="makes no sense"):
            compare(a, a, tolerance)
    save_file({"x": torch.ones(2)}, tmp_path / "hf" / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: has x, which model\.safetensors has, too"):
        compare(tmp_path / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is no intact safetensors file"):
        compare(tmp_path / "hf", tmp_path / "hf")


def test_a_damaged_checkpoint_is_a_mistake_and_no_difference(make: Make) -> None:
    a, b = make(), make()
    (b / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: cannot be read"):
        compare(a, b)
    changed(a / ".metadata", lambda content: content.__delitem__(slice(50, None)))
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        compare(a, b)
