"""Where Megatron-core computes: a GPU, or the CPU rig that stands in for one.

As shipped, Megatron-core needs CUDA. The rig gives it just enough of `torch.cuda` to run the same model, parallel
layout, distributed optimizer and distributed checkpoints on gloo ranks of a laptop, so that the exact layout of a run
can be rehearsed, and tested in CI, without a GPU. It changes torch for the whole process: a program installs it on
purpose, once, before it builds a model, and it refuses to do so where a GPU is there.

Tried with megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12). Differences between the two live here too.
"""

import contextlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from crystal_hpc.errors import BackendError

_active_rig: "_CudaIsCpu | None" = None


def megatron_version() -> tuple[int, int]:
    """(major, minor) of the installed megatron-core."""
    major, minor = importlib.metadata.version("megatron-core").split(".")[:2]
    return int(major), int(minor)


def choose_backend() -> str:
    """`cuda` where a GPU is there, else the CPU rig, installed; returns the name for logs and the journal."""
    # Megatron calls names that newer torch renames, and looks at gradients of pipeline inputs; nothing a user could act
    # on, and it would fill every log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|megatron")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    if torch.cuda.is_available():
        return "cuda"
    install_cpu_rig()
    return "cpu-rig"


def device() -> torch.device:
    """Where tensors of this process belong."""
    return torch.device("cpu" if _active_rig else "cuda")


def collective_backend() -> str:
    """The torch.distributed backend of the model's process groups."""
    return "gloo" if _active_rig else "nccl"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides Megatron's advice, at import and set-up, about what is rightly absent (Transformer Engine, CUDA graphs).

    Without a GPU it also keeps Megatron from decorating functions with torch.compile: our settings call none of them
    there, and the mere decorating imports torch's inductor, a quarter of a job's imports.
    """
    compiled = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.compile = compiled


def _uncompiled(function: Any = None, **_options: Any) -> Any:
    return _uncompiled if function is None else function


class _NoStream:
    """A CUDA stream or event on a machine that computes in program order: every operation is done at once."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def nothing(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    synchronize = wait_stream = wait_event = record = wait = __exit__ = nothing

    def record_event(self, *_args: Any) -> "_NoStream":
        return self

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_NoStream":
        return self


class _CudaIsCpu(TorchFunctionMode):
    """Sends to the CPU what is created on, or moved to, `cuda`; tells Megatron the tensor types it checks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(argument) else argument for argument in args)
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


class _GeneratorTracker:
    """Megatron's tracker of named CUDA random states, on CPU generators."""

    def __init__(self) -> None:
        self._generators: dict[str, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return bool(self._generators)

    def reset(self) -> None:
        self._generators.clear()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self._generators)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self._generators = dict(states)

    def add(self, name: str, seed: int) -> None:
        self._generators[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self._generators[name])
        try:
            yield
        finally:
            self._generators[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def _on_the_rig(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls with the mode on, which torch turns off for a backward pass: recomputation creates tensors there."""
    with _CudaIsCpu():
        return function(*args, **kwargs)


def install_cpu_rig() -> None:
    """Lets Megatron-core run on this machine's CPU. Raises BackendError where a GPU is there; twice is once."""
    global _active_rig
    if _active_rig is not None:
        return
    if torch.cuda.is_available():
        raise BackendError("the CPU rig is for machines without a GPU, and this one has one")
    # Torch itself imports this with the first optimizer step, and cannot do so once the names below are replaced.
    importlib.import_module("torch._dynamo")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = cuda.default_stream = lambda *_: _NoStream()
    cuda.Stream = cuda.Event = cuda.stream = _NoStream
    cuda.synchronize = cuda.set_device = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *_: 0
    autograd: Any = torch.autograd
    autograd._engine_run_backward = partial(_on_the_rig, autograd._engine_run_backward)
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    with quiet():
        from megatron.core.tensor_parallel import random as megatron_random

    # What recomputation restores.
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_random._CUDA_RNG_STATE_TRACKER = _GeneratorTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    _active_rig = _CudaIsCpu()
    _active_rig.__enter__()  # type: ignore[no-untyped-call]
