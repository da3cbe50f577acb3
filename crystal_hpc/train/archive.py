"""Where the numbers of a tensor lie in an archive of torch.save, so that they can be read into memory that is there.

torch.load takes new memory for what it reads, which costs as much as the reading. `distcp` asks here first, and leaves
to torch.load what is no plain tensor. Nothing in a pickle is executed.
"""

import io
import pickle
import sys
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


class Numbers(NamedTuple):
    """A tensor's numbers, row-major, in an archive."""

    dtype: torch.dtype
    at: int
    """Their first byte, counted from the start of the archive."""


def find_numbers(archive: IO[bytes], shape: tuple[int, ...]) -> Numbers | None:
    """Where the numbers of a tensor of this shape are; None where the archive holds anything but one plain tensor.

    Raises RuntimeError for what is no archive.
    """
    reader: Any = torch._C.PyTorchFileReader(archive)
    try:
        saved = _TensorUnpickler(io.BytesIO(reader.get_record("data.pkl"))).load()
        (dtype, record), offset, size, stride = saved
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError):
        return None
    little = not reader.has_record("byteorder") or reader.get_record("byteorder") == sys.byteorder.encode()
    plain = 0, shape, torch.empty(shape, device="meta").stride()
    if not little or (offset, tuple(size), tuple(stride)) != plain:
        return None
    return Numbers(dtype, reader.get_record_offset(f"data/{record}"))


class _TensorUnpickler(pickle.Unpickler):
    """Takes a pickle of one tensor to ((dtype, record), offset, size, stride), and runs nothing of it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict  # of hooks, of which a saved tensor has none
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, saved: Any) -> tuple[torch.dtype, str]:
        _, dtype, record, _, _ = saved
        return dtype, record


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
