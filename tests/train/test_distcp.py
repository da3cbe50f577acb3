"""The files of a distributed checkpoint: cut as they should be, whole or not used, and readable by others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig import generation, join, run_ranks, short_run, values

from crystal_hpc.errors import CheckpointError
from crystal_hpc.train import archive, distcp
from crystal_hpc.train.distcp import Chunk, FileWriter, Reader, Request, boxes, write_index
from crystal_hpc.train.keys import is_stack, key_of, name_of


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_of_a_stretch_hold_its_elements_in_their_order(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole, found = torch.arange(count).reshape(shape), []
    cut = list(boxes(shape, start, stop))
    for offset, size in cut:
        part = whole
        for axis, (at, length) in enumerate(zip(offset, size, strict=True)):
            part = part.narrow(axis, at, length)
        found += part.reshape(-1).tolist()
    assert found == list(range(start, stop))
    assert len(cut) <= 2 * len(shape) - 1


def written(folder: Path, *chunks: Chunk) -> Reader:
    folder.mkdir()
    writer = FileWriter(folder / "__0_0.distcp")
    for chunk in chunks:
        writer.add(chunk)
    write_index(folder, writer.close().placed)
    return Reader(folder)


def test_chunks_have_a_largest_size_and_any_box_is_read_across_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distcp, "LARGEST_CHUNK", 400)
    tensor = torch.randn(3, 20, 30)
    reader = written(tmp_path / "out", Chunk("x", (3, 20, 30), (0, 0, 0), tensor))
    sizes = [math.prod(chunk.sizes) * 4 for chunk in reader.tensors["x"].chunks]
    assert max(sizes) <= 400 and sum(sizes) == tensor.nbytes
    target = torch.empty(2, 7, 11)
    reader.read([Request("x", (1, 9, 4), target)])
    assert torch.equal(target, tensor[1:, 9:16, 4:15])


def test_the_numbers_of_what_we_have_written_are_found_without_torch(tmp_path: Path) -> None:
    writer = FileWriter(tmp_path / "__0_0.distcp")
    for dtype in archive.DTYPES.values():
        writer.add(Chunk(str(dtype), (3, 4), (0, 0), torch.ones(3, 4, dtype=dtype)))
    with open(tmp_path / "__0_0.distcp", "rb") as file:
        for one in writer.close().placed:
            found = archive.find_numbers(archive.Part(file, one.at, one.length), one.size)
            assert found is not None and found.dtype == one.dtype


def test_a_tensor_that_is_not_whole_is_noticed(tmp_path: Path) -> None:
    reader = written(tmp_path / "out", Chunk("x", (4, 5), (1, 0), torch.ones(3, 5)))
    with pytest.raises(CheckpointError, match="holds 15 of the 20 numbers wanted of x"):
        reader.read([Request("x", (0, 0), torch.empty(4, 5))])
    with pytest.raises(CheckpointError, match="has no tensor y"):
        reader.read([Request("y", (0,), torch.empty(1))])


def test_a_box_written_twice_does_not_stand_in_for_one_that_is_missing(tmp_path: Path) -> None:
    part = Chunk("x", (4, 5), (2, 0), torch.ones(2, 5))
    reader = written(tmp_path / "out", part, part)
    with pytest.raises(CheckpointError, match="holds some numbers of x twice"):
        reader.read([Request("x", (0, 0), torch.empty(4, 5))])


@pytest.mark.parametrize("outside", ["../secret.distcp", "/etc/hostname"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, outside: str) -> None:
    writer = FileWriter(tmp_path / "__0_0.distcp")
    writer.add(Chunk("x", (4,), (0,), torch.ones(4)))
    write_index(tmp_path, [placed._replace(file=outside) for placed in writer.close().placed])
    with pytest.raises(CheckpointError, match=r"\.metadata: names .*which is no file of this folder"):
        Reader(tmp_path)


def test_the_name_of_a_tensor_and_its_key_go_both_ways() -> None:
    assert key_of("decoder.layers.12.mlp.linear_fc2.weight") == ("decoder.layers.mlp.linear_fc2.weight", 12)
    for name in ("decoder.layers.3.x.y", "decoder.final_layernorm.weight", "embedding.word_embeddings.weight"):
        key, layer = key_of(name)
        assert name_of(key, layer) == name
        assert is_stack(key) == (layer is not None)
    assert not is_stack("decoder.layers.3.x.y")


def read_by_megatron(rank: int, size: int, meeting: str, folder: Path, place: Path) -> list[str]:
    """The weights that differ from ours once Megatron-core itself has loaded them."""
    from megatron.core import dist_checkpointing

    from crystal_hpc.train import sharding

    model: Any = sharding.module(join(rank, size, meeting, folder))
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(place))["model"])
    parts, reader, wrong = sharding.model_parts(model), Reader(place), []
    for part in parts:
        expected = torch.empty_like(part.tensor)
        reader.read([Request(part.key, part.offset, expected)])
        wrong += [] if torch.equal(expected, part.tensor) else [part.key]
    return wrong


def read_by_torch(_rank: int, _size: int, _meeting: str, place: Path) -> list[str]:
    """The tensors that differ from ours as torch's own reader finds them."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader, wrong = Reader(place), []
    found = {key: torch.empty(reader.shape(key), dtype=reader.dtype(key)) for key in reader.tensors}
    load(found, storage_reader=FileSystemReader(place), no_dist=True)
    for key, tensor in found.items():
        expected = torch.empty_like(tensor)
        reader.read([Request(key, (0,) * tensor.ndim, expected)])
        wrong += [] if torch.equal(expected, tensor) else [key]
    return wrong if len(found) > 10 else ["nothing was read"]


def test_megatron_and_torch_read_what_a_run_has_saved(new_run: Callable[..., Path]) -> None:
    folder = short_run(new_run, 2)
    place = generation(folder, 3)
    assert values(run_ranks(read_by_megatron, 2, folder, place)) == [[], []]
    assert values(run_ranks(read_by_torch, 1, place)) == [[]]
