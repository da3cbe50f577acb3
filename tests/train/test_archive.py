"""Where a saved tensor's numbers lie is told of plain tensors alone, and of whole ones."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from crystal_hpc.train.archive import DTYPES, Part, find_numbers


def saved(thing: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (2, 3, 4)])
def test_the_numbers_of_a_plain_tensor_are_found_in_place(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    content = saved(tensor)
    found = find_numbers(io.BytesIO(content), shape)
    assert found is not None and found.dtype == dtype
    numbers = torch.frombuffer(bytearray(content), dtype=dtype, offset=found.at, count=tensor.numel())
    assert torch.equal(numbers.reshape(shape), tensor)


@pytest.mark.parametrize(
    "thing",
    [
        torch.ones(3, 5).T,
        torch.ones(6, 3)[1:],
        torch.ones(5, 3),
        torch.ones(5, 3, dtype=torch.int32),
        torch.nn.Parameter(torch.ones(5, 3)),
        [torch.ones(5, 3)],
        {"a": 1},
    ],
    ids=["transposed", "a part", "another shape", "whole numbers", "a parameter", "a list", "no tensor"],
)
def test_anything_else_is_left_to_torch(thing: Any) -> None:
    shape = (5, 3) if not isinstance(thing, torch.Tensor) or thing.shape != (5, 3) else (15, 1)
    assert find_numbers(io.BytesIO(saved(thing)), shape) is None


def rewritten(content: bytes, name: str, new: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with another content of a record."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as archive:
        for entry in old.infolist():
            changed = entry.filename.endswith(name)
            archive.writestr(entry.filename, new if changed else old.read(entry), method if changed else None)
    return out.getvalue()


def test_a_record_that_is_too_short_packed_or_of_another_byte_order_is_left_to_torch() -> None:
    content, numbers = saved(torch.ones(8)), torch.ones(8).numpy().tobytes()
    assert find_numbers(io.BytesIO(rewritten(content, "data/0", numbers)), (8,)) is not None
    assert find_numbers(io.BytesIO(rewritten(content, "data/0", numbers[:-4])), (8,)) is None
    assert find_numbers(io.BytesIO(rewritten(content, "data/0", numbers, zipfile.ZIP_DEFLATED)), (8,)) is None
    assert find_numbers(io.BytesIO(rewritten(content, "byteorder", b"big")), (8,)) is None


def test_what_is_no_archive_and_what_is_cut_off_are_left_to_torch() -> None:
    content = saved(torch.ones(1000))
    for cut in (0, 10, len(content) // 2, len(content) - 30):
        assert find_numbers(io.BytesIO(content[:cut]), (1000,)) is None


def test_nothing_in_a_pickle_is_run() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('was run')",)

    assert find_numbers(io.BytesIO(saved(Evil())), (1,)) is None


def test_a_stretch_of_a_file_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as file:
        part = Part(file, 10, 50)
        assert part.read() == bytes(range(10, 60))
        assert part.seek(-5, os.SEEK_END) == 45 and part.read(100) == bytes(range(55, 60)) and part.read(1) == b""
        assert part.seek(2) == 2 and part.seek(3, os.SEEK_CUR) == part.tell() == 5 and part.read(2) == b"\x0f\x10"
        assert part.seek(70) == 70 and part.read(1) == b""
        with pytest.raises(OSError, match="before the beginning"):
            part.seek(-1)
        with pytest.raises(EOFError, match="ends too early"):
            Part(file, 90, 20).read()
