"""muP's multipliers inside the weights, for formats whose code knows none: exact where each is a power of two.

Such a factor changes a number's exponent and no bit of its mantissa, so dividing gives the same number back. Not so at
the ends of a number format, where numbers overflow or lose bits as subnormals: `names` therefore scales every number
back and compares. The factors, on the Megatron side, are on the embedded tokens, on the logits (base_hidden / hidden
included), and on attention scores, where the weights of the query take what 1/d differs from the usual 1/sqrt(d).
"""

import math

from crystal_hpc.config import derive
from crystal_hpc.convert.names import Shape


def embedding_factor(shape: Shape) -> float:
    """What the embedding's rows are multiplied by."""
    return derive.embedding_scale(shape.mup)


def head_factor(shape: Shape) -> float:
    """What the output head's rows are multiplied by."""
    return derive.output_scale(shape.model, shape.mup)


def query_factor(shape: Shape) -> float:
    """What the query's rows are multiplied by."""
    return derive.attention_scale(shape.model, shape.mup) / derive.attention_scale(shape.model, None)


def has_two_ends(shape: Shape) -> bool:
    """Whether a tied table becomes two published ones, because their factors differ."""
    return shape.model.tied_embeddings and embedding_factor(shape) != head_factor(shape)


def reasons_against(shape: Shape) -> list[str]:
    """Which of a model's multipliers cannot go into its weights, one clause for each key."""
    mup = shape.mup
    if mup is None:
        return []
    output = f"{mup.output_multiplier:g} x base_hidden / hidden = {head_factor(shape):g}"
    factors = {
        f"mup.embedding_multiplier: {mup.embedding_multiplier:g}": embedding_factor(shape),
        f"mup.output_multiplier: {output}": head_factor(shape),
        f"mup.scale_attention_by_head: the square root of a head's {shape.head_width} dimensions": query_factor(shape),
    }
    return [
        f"{said} is no power of two and cannot go into the weights exactly (crystalcoder's config has a field for it)"
        for said, factor in factors.items()
        if math.frexp(factor)[0] != 0.5
    ]
