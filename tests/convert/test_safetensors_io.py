"""Safetensors files, tensor by tensor, against the library of that name, and against files that were tampered with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from crystal_hpc.convert.blocks import Arena, Norm, contiguous, copy
from crystal_hpc.convert.safetensors_io import DTYPES, SafetensorsFile, SafetensorsWriter, WrittenFile
from crystal_hpc.errors import CheckpointError


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (100 * torch.randn(shape, generator=generator)).to(dtype)


def write(path: Path, tensors: dict[str, Tensor]) -> WrittenFile:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.close()


def test_the_library_reads_what_we_write_in_every_dtype_and_memory_order(tmp_path: Path) -> None:
    tensors = {name: numbers(3, 5, dtype=dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "transposed": numbers(700, 300).T,
        "bfloat16 transposed": numbers(700, 300, dtype=torch.bfloat16).T,
        "strided": numbers(40, 6)[:, ::2],
        "permuted": numbers(4, 5, 6).permute(2, 0, 1),
        "repeated": numbers(4, 1).expand(4, 5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "ü/山": numbers(2),
    }
    tensors["longer than a block"] = numbers(3, 1 << 20)
    written = write(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert list(read) and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    content = (tmp_path / "a.safetensors").read_bytes()
    assert (written.bytes, written.digest) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert written.tensors["permuted"] == xxhash.xxh3_128_hexdigest(tensors["permuted"].contiguous().numpy())


def test_we_read_what_the_library_writes_whole_and_by_rows(tmp_path: Path) -> None:
    tensors = {name: numbers(7, 5, dtype=dtype) for name, dtype in DTYPES.items()} | {"scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "ü"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            file.read_ahead(name)
            assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype
            if tensor.ndim:
                assert torch.equal(file.read(name, 2, 5), tensor[2:5])
                assert file.read(name, 3, 3).shape == (0, 5)
        with pytest.raises(ValueError, match="rows"):
            file.read("F32", 2, 8)


def test_numbers_are_rounded_to_the_dtype_of_the_layout(tmp_path: Path) -> None:
    exact = numbers(33, 65).T
    layout = {"a": (torch.bfloat16, (65, 33)), "b": (torch.bfloat16, (33, 65))}
    with SafetensorsWriter(tmp_path / "a.safetensors", layout) as writer:
        writer.write("a", exact)
        writer.write("b", exact.T)
        writer.close()
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["a"], exact.bfloat16()) and torch.equal(read["b"], exact.T.bfloat16())


def test_a_tensor_out_of_turn_or_left_out_is_a_fault_of_the_caller(tmp_path: Path) -> None:
    layout = {name: (torch.float32, (2,)) for name in "ab"}
    with SafetensorsWriter(tmp_path / "a", layout) as writer:
        with pytest.raises(ValueError, match="b of shape .* is not what comes next"):
            writer.write("b", torch.ones(2))
        with pytest.raises(ValueError, match="a of shape"):
            writer.write("a", torch.ones(3))
        writer.write("a", torch.ones(2))
        with pytest.raises(ValueError, match="b was not written"):
            writer.close()


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(header: Any, data: int = 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes"),
        (b"1234567", "has 7 bytes"),
        (raw({}, length=2**63), "its header would be"),
        (raw({}, data=0, length=3), "its header would be 3 bytes long, and the file has 10"),
        (raw(b"{nonsense"), "its header is no JSON"),
        (raw(b"\xff\xfe{}"), "its header is no JSON"),
        (raw(b"[" * 100_000), "its header is no JSON"),
        (raw([]), "its header is no JSON object"),
        (raw(b'{"a": {}, "a": {}}'), "a name stands in it twice"),
        (raw({"a": 1}), "lacks dtype, shape or data_offsets of 'a'"),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}), "lacks dtype, shape or data_offsets"),
        (raw({"a": entry(0, 8, dtype="F4")}), "a has the dtype 'F4'; known are"),
        (raw({"a": entry(0, 8, dtype=[])}), "a has the dtype"),
        (raw({"a": entry(0, 8, shape="2")}), "are no whole numbers"),
        (raw({"a": entry(0, 8, shape=[2.0])}), "are no whole numbers"),
        (raw({"a": entry(0, 8, shape=[True, 2])}), "are no whole numbers"),
        (raw({"a": entry(0, 8, shape=[-1, -2])}), "are no whole numbers"),
        (raw({"a": entry(8, 0)}), "which do not make F32 of shape"),
        (raw({"a": entry(0, 8, shape=[3])}), "a has 8 bytes, which do not make F32 of shape [3]"),
        (raw({"a": entry(0, 8), "b": entry(4, 12)}, 12), "b begins at byte 4 and not at 8"),
        (raw({"a": entry(0, 8), "b": entry(12, 20)}, 20), "b begins at byte 12 and not at 8"),
        (raw({"a": entry(0, 8)}, 7), "has 7 bytes of tensors instead of 8: it was cut short"),
        (raw({"a": entry(0, 8)}, 9), "has 9 bytes of tensors instead of 8: more than its header says"),
        (raw({"a": entry(0, 2**62, [2**60])}), "it was cut short"),
    ],
)
def test_a_file_that_is_not_intact_is_refused_in_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert said in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_shrinks_later_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(path)
    write(path, {"a": numbers(100)})
    with SafetensorsFile(path) as file, open(path, "r+b") as other:
        other.truncate(200)
        with pytest.raises(CheckpointError, match="ends within a"):
            file.read("a")


def test_norms_are_those_of_float64_and_see_what_is_no_number() -> None:
    tensor = numbers(1000, 700, dtype=torch.bfloat16)
    assert Norm().add(tensor).value == pytest.approx(float(tensor.double().norm()), rel=1e-5)
    assert Norm().add(tensor[:300]).add(tensor[300:]).value == pytest.approx(Norm().add(tensor).value, rel=1e-6)
    assert Norm().value == 0
    assert not Norm().add(torch.tensor([1.0, torch.nan])).value >= 0


def test_a_tensor_in_row_major_order_is_not_copied() -> None:
    tensor = numbers(20, 30)
    assert contiguous(tensor) is tensor
    assert torch.equal(contiguous(tensor.T), tensor.T) and contiguous(tensor.T).is_contiguous()
    assert torch.equal(contiguous(tensor.T, torch.bfloat16), tensor.T.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_the_same_whichever_side_is_transposed(dtype: torch.dtype) -> None:
    source, wide = numbers(3, 600, 700), numbers(600, 2100)
    for target, taken in (
        (torch.zeros(600, 700, dtype=dtype), source[0]),
        (torch.zeros(700, 600, dtype=dtype), source[0].T),
        (torch.zeros(700, 600, dtype=dtype).T, source[1]),
        (torch.zeros(700, 600, dtype=dtype).T, source[1].T.contiguous().T),
        (torch.zeros(3, 700, 600, dtype=dtype), source.transpose(1, 2)),
        (torch.zeros(3, 700, 600, dtype=dtype), wide.T.view(3, 700, 600)),
        (torch.zeros(600, 2100, dtype=dtype).T.view(3, 700, 600), source.transpose(1, 2)),
    ):
        copy(target, taken)
        assert torch.equal(target, taken.to(dtype))


def test_an_arena_gives_whole_tensors_of_every_kind_from_the_same_memory() -> None:
    arena = Arena()
    wanted = [((3, 5), torch.bfloat16), ((), torch.float64), ((0, 7), torch.int8), ((4,), torch.float32)]
    tensors = arena.tensors(wanted)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] == wanted
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(tensors))
    (again,) = arena.tensors(wanted[:1])
    assert again.data_ptr() == tensors[0].data_ptr()
    (larger,) = arena.tensors([((1000,), torch.float32)])
    assert larger.fill_(1).sum() == 1000
