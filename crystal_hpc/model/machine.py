"""What of the things that fast kernels need is on this machine. `precision` compares it with what a config asks for."""

import importlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from crystal_hpc.model import backend


@dataclass(frozen=True)
class Machine:
    """Facts about one rank's machine. The defaults are those of one without a GPU."""

    gpu: str = ""
    """The device's name; empty on the CPU rig."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability: (9, 0) is Hopper."""
    cuda: tuple[int, int] = (0, 0)
    """Version that torch was built for."""
    transformer_engine: tuple[int, ...] = ()
    """Version; empty where it cannot be used."""
    why_no_transformer_engine: str = "it is not installed"
    flash_attention: bool = False
    """Whether the flash-attn package is there."""
    triton: bool = False
    """Whether Triton is there, and the C compiler that it calls."""
    apex: bool = False
    """Whether NVIDIA's apex is there, with its CUDA extensions."""
    fused_gradients: bool = False
    """Whether apex's fused_weight_gradient_mlp_cuda is there."""
    false_apex: str = ""
    """Folder of a package that is called apex and is not NVIDIA's; empty without one."""


def probe() -> Machine:
    """Looks at this machine. The process must have chosen its backend."""
    apex, false_apex = find_apex()
    if backend.device().type != "cuda":
        return Machine(false_apex=false_apex)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    version, why = _transformer_engine()
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return Machine(
        gpu=properties.name,
        capability=(properties.major, properties.minor),
        cuda=(int(major), int(minor)),
        transformer_engine=version,
        why_no_transformer_engine=why,
        flash_attention=_is_there("flash_attn"),
        triton=_is_there("triton") and _have_compiler(),
        apex=apex,
        fused_gradients=_is_there("fused_weight_gradient_mlp_cuda"),
        false_apex=false_apex,
    )


def find_apex() -> tuple[bool, str]:
    """Whether NVIDIA's apex can be used, and the folder of a package that only has its name.

    PyPI's apex is a toolkit for web applications; Megatron would take it for NVIDIA's and fail when it builds a norm.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False, ""
    folders = list(spec.submodule_search_locations or [])
    if not any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders):
        return False, folders[0] if folders else str(spec.origin)
    return _is_there("amp_C") and _is_there("fused_layer_norm_cuda"), ""


def _transformer_engine() -> tuple[tuple[int, ...], str]:
    """Its version, or why it cannot be used."""
    if not _is_there("transformer_engine"):
        return (), "it is not installed"
    try:
        found = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library that does not load raises what it likes
        return (), f"it cannot be imported ({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]})"
    return tuple(int(part) for part in str(found.__version__).split("+")[0].split(".")[:2]), ""


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _have_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
