"""What ranks have to say to each other outside the model: agree on a flag, share a value, wait for everyone.

`Comm` is the whole vocabulary. `SoloComm` is one process, `TorchComm` a torch.distributed job, `MpiComm` the processes
that mpiexec or srun started for work on data. Tensors of the model never pass through here; Megatron-core moves those.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol


class Comm(Protocol):
    """The ranks of a job, seen from one of them."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Returns once every rank has come here."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank."""

    def any_true(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; every rank gets the same answer."""

    def sum(self, values: list[int]) -> list[int]:
        """Element by element sum over the ranks, modulo 2**64."""

    def sum_float(self, value: float) -> float:
        """Sum over the ranks, the same on every rank."""


class BytesComm(Comm, Protocol):
    """Ranks that can also hand each other large pieces of data."""

    def share(self, buffer: memoryview, root: int) -> None:
        """Fills the buffer, of the same size on every rank, with what rank `root` has in it."""


class SoloComm:
    """A job of one process."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        return None

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def any_true(self, flag: bool) -> bool:
        return flag

    def sum(self, values: list[int]) -> list[int]:
        return [value % 2**64 for value in values]

    def sum_float(self, value: float) -> float:
        return value

    def share(self, buffer: memoryview, root: int) -> None:
        return None


class TorchComm:
    """All ranks of an initialised torch.distributed job, over a gloo group of its own.

    Gloo, because these are small host-side messages: they must not wait for the GPU's queue, nor leave work on it.
    """

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    def barrier(self) -> None:
        self._dist.barrier(group=self._group)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def any_true(self, flag: bool) -> bool:
        return self.sum([int(flag)])[0] > 0

    def sum(self, values: list[int]) -> list[int]:
        # int64 wraps around, which is addition modulo 2**64 once read back as unsigned.
        signed = [(value + 2**63) % 2**64 - 2**63 for value in values]
        tensor = self._torch.tensor(signed, dtype=self._torch.int64, device="cpu")
        self._dist.all_reduce(tensor, group=self._group)
        return [value % 2**64 for value in tensor.tolist()]

    def sum_float(self, value: float) -> float:
        tensor = self._torch.tensor([value], dtype=self._torch.float64, device="cpu")
        self._dist.all_reduce(tensor, group=self._group)
        return float(tensor)


class MpiComm:
    """All processes of MPI's COMM_WORLD. Importing mpi4py joins them, so it is imported here and nowhere else.

    A rank that ends with an error of ours takes the others with it: they would wait for it for ever.
    """

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self.rank = self._world.Get_rank()
        self.size = self._world.Get_size()
        if self.size > 1:
            sys.excepthook = self._abort

    def barrier(self) -> None:
        self._world.Barrier()

    def broadcast(self, value: Any) -> Any:
        return self._world.bcast(value)

    def gather(self, value: Any) -> list[Any]:
        return list(self._world.allgather(value))

    def any_true(self, flag: bool) -> bool:
        return bool(self._world.allreduce(int(flag), self._mpi.MAX))

    def sum(self, values: list[int]) -> list[int]:
        return [sum(column) % 2**64 for column in zip(*self._world.allgather(values), strict=True)]

    def sum_float(self, value: float) -> float:
        return float(sum(self._world.allgather(value)))

    def share(self, buffer: memoryview, root: int) -> None:
        self._world.Bcast(buffer, root)

    def _abort(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        self._world.Abort(1)


def launched_by_mpi(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher that knows MPI (mpiexec, srun --mpi=pmi2) started this process, and mpi4py is there."""
    told = any(name in environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))
    return told and importlib.util.find_spec("mpi4py") is not None


def my_comm() -> BytesComm:
    """The ranks that this process was started with: `MpiComm`, or `SoloComm` where it is alone."""
    return MpiComm() if launched_by_mpi() else SoloComm()
