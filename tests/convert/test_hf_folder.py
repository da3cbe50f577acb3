"""Hugging Face folders of every kind are read, and those that are not whole are refused in one line."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crystal_hpc.convert.hf_folder import HfFolder
from crystal_hpc.errors import CheckpointError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = {f"h.{n}.weight": torch.randn(4, 6, generator=generator).bfloat16() for n in range(4)}
    return {**made, "h.0.mask": torch.ones(3, 3, dtype=torch.bool), "f": torch.randn(5, generator=generator)}


def save_torch(content: dict[str, Tensor], path: Path) -> None:
    torch.save(content, path)


def save_old_torch(content: dict[str, Tensor], path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


Save = Callable[[dict[str, Tensor], Path], None]
KINDS: dict[str, tuple[Save, str, str]] = {
    "safetensors": (save_file, "model", "safetensors"),
    "torch": (save_torch, "pytorch_model", "bin"),
    "old torch": (save_old_torch, "pytorch_model", "bin"),
}


def make(folder: Path, kind: str, shards: int) -> Path:
    save, stem, suffix = KINDS[kind]
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "test"}')
    content = tensors()
    if shards == 1:
        save(content, folder / f"{stem}.{suffix}")
        return folder
    placed = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = dict(list(content.items())[number::shards])
        save(part, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_gives_the_same_tensors(kind: str, shards: int, tmp_path: Path) -> None:
    folder = HfFolder(make(tmp_path / "hf", kind, shards))
    assert folder.config == {"model_type": "test"}
    assert folder.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        found = folder.tensors[name]
        assert (found.dtype, found.shape, found.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        folder.read_ahead(name)
        assert torch.equal(folder.read(name), tensor) and folder.read(name).is_contiguous()
    folder.close()


def test_safetensors_come_before_torch_files_where_a_folder_has_both(tmp_path: Path) -> None:
    make(tmp_path / "hf", "safetensors", 1)
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"rubbish")
    assert torch.equal(HfFolder(tmp_path / "hf").read("f"), tensors()["f"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_comes_before_the_index_of_another_save(kind: str, tmp_path: Path) -> None:
    """As in Transformers, whose saves leave the one or the other behind."""
    folder, (save, stem, suffix) = make(tmp_path / "hf", kind, 3), KINDS[kind]
    save({"f": torch.ones(5)}, folder / f"{stem}.{suffix}")
    assert torch.equal(HfFolder(folder).read("f"), torch.ones(5)) and HfFolder(folder).tensors.keys() == {"f"}
    for path in folder.glob(f"{stem}-*"):
        path.unlink()
    assert HfFolder(folder).tensors.keys() == {"f"}


def test_another_state_of_the_folder_has_another_identity(tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", "safetensors", 3)
    before = HfFolder(folder).identity()
    assert before == HfFolder(folder).identity() and len(before) == 5
    os.utime(folder / "model-00002-of-00003.safetensors", (1, 1))
    assert before != HfFolder(folder).identity()


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def spoil(folder: Path, how: str) -> None:
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    second = folder / "model-00002-of-00003.safetensors"
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "config of nonsense":
            (folder / "config.json").write_text("{")
        case "config is a list":
            (folder / "config.json").write_text("[]")
        case "a shard is missing":
            second.unlink()
        case "two shards are missing":
            second.unlink()
            (folder / "model-00003-of-00003.safetensors").unlink()
        case "a shard is cut short":
            second.write_bytes(second.read_bytes()[:-5])
        case "the index lacks a tensor":
            del placed["f"]
        case "the index names a tensor that is nowhere":
            placed["ghost"] = second.name
        case "the index names another file":
            placed["f"] = "model-00001-of-00003.safetensors"
        case "the index leads out of the folder":
            placed["f"] = "../secret.safetensors"
        case "the index is empty":
            placed.clear()
        case "no weights":
            index.unlink()
        case "a tensor stands in two files":
            save_file({"f": tensors()["f"], "h.1.weight": tensors()["h.1.weight"]}, second)
    if index.exists():
        index.write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no config", "hf: has no config.json, so it is no Hugging Face folder"),
        ("config of nonsense", "config.json: cannot be read"),
        ("config is a list", "config.json: is no JSON object"),
        ("a shard is missing", "model-00002-of-00003.safetensors: missing; the index names it"),
        ("two shards are missing", "model-00002-of-00003.safetensors and 1 more: missing"),
        ("a shard is cut short", "model-00002-of-00003.safetensors: is no intact safetensors file"),
        ("the index lacks a tensor", "model-00003-of-00003.safetensors: holds f, which the index lacks"),
        ("the index names a tensor that is nowhere", "model-00002-of-00003.safetensors: lacks ghost"),
        ("the index names another file", "model-00001-of-00003.safetensors: lacks f, which the index says is in it"),
        ("the index leads out of the folder", "puts f into '../secret.safetensors', which is no file of weights"),
        ("the index is empty", "has no weight_map"),
        ("no weights", "has neither model.safetensors nor pytorch_model.bin"),
        ("a tensor stands in two files", "is both in"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(how: str, said: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", "safetensors", 3)
    spoil(folder, how)
    with pytest.raises(CheckpointError) as caught:
        HfFolder(folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_or_holds_no_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "hf", "torch", 1)
    for content in (Harmful(), {"a": Harmful()}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="cannot be read"):
            HfFolder(folder)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(CheckpointError, match="cannot be read"):
            HfFolder(folder)
    assert not (tmp_path / "harmed").exists()
    for other in ([torch.ones(2)], {"a": {"b": torch.ones(2)}}):
        torch.save(other, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="is not a table of tensors"):
            HfFolder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        HfFolder(folder)
