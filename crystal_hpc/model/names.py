"""A parameter's name in the whole model, whichever pipeline stage holds it."""

import re

import torch


def global_name(model: torch.nn.Module, name: str) -> str:
    """`decoder.layers.0.x` of the second stage of a four-layer, two-stage model is `decoder.layers.2.x`."""
    match = re.match(r"(.*decoder\.layers\.)(\d+)(\..*)", name)
    if match is None:
        return name
    layer = model.get_submodule(f"{match[1]}{match[2]}")
    return f"{match[1]}{layer.layer_number - 1}{match[3]}"  # type: ignore[operator]
