"""What ranks have to say to each other outside the model: agree on a flag, share a value, wait for everyone.

`Comm` is the whole vocabulary. `SoloComm` is one process, `TorchComm` a torch.distributed job. Tensors of the model
never pass through here; Megatron-core moves those.
"""

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
