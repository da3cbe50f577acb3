"""muP as Crystal used it: which parameter starts how large, and which learning rate and weight decay it gets.

The multipliers in the forward pass are applied in `gpt`; here is the table by parameter. Megatron's own `use_mup`
exists only from 0.17 and differs in details. Sources: Crystal's published parameters and the Cerebras model zoo 1.9.1,
which trained it.

Each weight starts from its own random stream, keyed by seed and name, cut from the full tensor: so the same weights
come out under every parallel layout, on any number of ranks.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.model.names import global_name

# What a parameter is, by the end of its Megatron name.
ROLES = {
    "word_embeddings.weight": "embedding",
    "output_layer.weight": "embedding",  # its own, or a last stage's copy of the tied embedding
    "linear_qkv.weight": "matrix",
    "linear_fc1.weight": "matrix",
    "linear_proj.weight": "residual",
    "linear_fc2.weight": "residual",
    "layernorm.weight": "one",
    "layer_norm_weight": "one",
    ".bias": "zero",
    "layer_norm_bias": "zero",
}


def role(name: str) -> str:
    """`embedding`, `matrix`, `residual` (a matrix that writes to the residual stream), `one` or `zero`."""
    for suffix, kind in ROLES.items():
        if name.endswith(suffix):
            return kind
    raise AssertionError(f"no role for parameter {name}")


def learning_rate_multiplier(run: Run, name: str) -> float:
    """Matrices learn base_hidden / hidden times as fast under muP; embeddings, norms and biases at the full rate."""
    return derive.width_multiplier(run.model, run.mup) if role(name) in ("matrix", "residual") else 1.0


def weight_decay_multiplier(name: str) -> float:
    """Decay on matrices and embeddings, none on biases and norms."""
    return 0.0 if role(name) in ("one", "zero") else 1.0


@torch.no_grad()
def initialize(model: torch.nn.Module, run: Run, tensor_rank: int, tensor_size: int) -> None:
    """Sets every parameter of this rank's part of the model to its initial value."""
    for name, parameter in model.named_parameters():
        kind = role(name)
        if kind in ("one", "zero"):
            parameter.fill_(float(kind == "one"))
            continue
        shape, std = _full_shape(parameter, tensor_size), derive.init_std(run.model, run.mup, kind)
        padding = int(model.config.ffn_hidden_size) - run.model.ffn  # type: ignore[union-attr,arg-type]
        shape = [size - more for size, more in zip(shape, _padded(name, padding), strict=True)]
        full = truncated_normal(shape, std, _key(run.seed, _stream(model, name)))
        parameter.copy_(_shard(_pad(full, name, padding), parameter, name, tensor_rank, tensor_size))


def truncated_normal(shape: list[int], std: float, key: int) -> torch.Tensor:
    """float32 on the CPU: a normal distribution of scale `std` before it is cut at two `std` on either side.

    By the inverse of the distribution function, from NumPy's counter-based Philox: torch's own generators and
    `trunc_normal_` differ between versions and devices, and a run must start from the same weights on all of them.
    """
    uniform = np.random.Generator(np.random.Philox(key=key)).random(shape, dtype=np.float32)
    edge = math.erf(2 / math.sqrt(2))
    inside = torch.from_numpy(uniform).mul_(2).sub_(1).mul_(edge)  # erf of the value over sqrt(2)
    return inside.erfinv_().mul_(math.sqrt(2) * std).clamp_(-2 * std, 2 * std)


def _stream(model: torch.nn.Module, name: str) -> str:
    # With tied embeddings and pipeline stages, the last stage holds a copy of the embedding under another name.
    tied: Any = getattr(model, "share_embeddings_and_output_weights", False)
    if tied and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"
    return global_name(model, name)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"init|{seed}|{name}".encode(), digest_size=8).digest(), "little") >> 1


def _padded(name: str, padding: int) -> tuple[int, int]:
    """How many rows and columns of a matrix are there only to pad the feed-forward width (`memory.padded_ffn`)."""
    fc1, fc2 = name.endswith("linear_fc1.weight"), name.endswith("linear_fc2.weight")
    return (2 * padding if fc1 else 0, padding if fc2 else 0)


def _pad(full: torch.Tensor, name: str, padding: int) -> torch.Tensor:
    """Zeros below each half of SwiGLU's input matrix, and to the right of its output matrix."""
    rows, columns = _padded(name, padding)
    halves = full.chunk(2) if rows else [full]
    return torch.cat([torch.nn.functional.pad(half, (0, columns, 0, rows // 2)) for half in halves])


def _full_shape(parameter: torch.nn.Parameter, tensor_size: int) -> list[int]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tensor_size  # type: ignore[attr-defined]
    return shape


def _shard(full: torch.Tensor, parameter: torch.nn.Parameter, name: str, rank: int, size: int) -> torch.Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith("linear_fc1.weight"):
        # SwiGLU's gate and value stand one above the other; each rank holds its rows of both.
        return torch.cat([half.chunk(size, dim)[rank] for half in full.chunk(2, dim)], dim)
    return full.chunk(size, dim)[rank]
