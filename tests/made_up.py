"""Random tensors in the shapes of Megatron's parameters, written out anew: nothing of this comes from the tables."""

import torch

from crystal_hpc.config.schema import Model
from crystal_hpc.train.keys import is_stack, key_of


def megatron_tensors(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32, by Megatron's names; no weight of a norm is far from one."""
    h, f = model.hidden, model.ffn
    kinds = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (model.vocab_size, h)}
    shapes |= {f"decoder.final_layernorm.{kind}": (h,) for kind in kinds}
    if not model.tied_embeddings:
        shapes["output_layer.weight"] = (model.vocab_size, h)
    for n in range(model.layers):
        layer = f"decoder.layers.{n}."
        for norm in ("self_attention.linear_qkv.layer_norm", "mlp.linear_fc1.layer_norm"):
            shapes |= {f"{layer}{norm}_{kind}": (h,) for kind in kinds}
        for linear, outputs, inputs in (
            ("self_attention.linear_qkv", 3 * h, h),
            ("self_attention.linear_proj", h, h),
            ("mlp.linear_fc1", 2 * f, h),
            ("mlp.linear_fc2", h, f),
        ):
            shapes[f"{layer}{linear}.weight"] = (outputs, inputs)
            if model.bias:
                shapes[f"{layer}{linear}.bias"] = (outputs,)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.15 * torch.randn(shape, generator=generator) + ("norm" in name and "weight" in name)
        for name, shape in shapes.items()
    }


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by the keys of a checkpoint's files, which stack the layers."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():  # layers in order
        found.setdefault(key_of(name)[0], []).append(tensor)
    return {key: torch.stack(parts) if is_stack(key) else parts[0] for key, parts in found.items()}
