"""How a run is computed: layout, 8-bit products, recomputation, kernels. Sections of `schema.Run`.

Of these only `Fp8` is part of what is trained; the rest may change between the attempts of a run. What the machine must
have for each is in `model.precision`, which refuses what is missing when a job starts.
"""

from typing import Literal

from pydantic import Field

from crystal_hpc.config.fields import Positive, Strict


class Parallel(Strict):
    """How the ranks share the model; data-parallel ranks are what is left. May change between attempts of a run."""

    tensor: Positive = 1
    """Ranks that share every matrix; divides heads."""
    pipeline: Positive = 1
    """Stages that share the layers; divides layers."""
    context: Positive = 1
    """Ranks that share each sequence; 2 x this divides the sequence length. More than 1 needs Transformer Engine."""
    sequence: bool = False
    """Norms and the residual stream also shared by the ranks of `tensor`, along the sequence; needs `tensor` > 1."""
    micro_batch: Positive = 1
    """Sequences in one forward pass of one data-parallel rank."""
    distributed_optimizer: bool = True
    """Share the optimizer's state among the data-parallel ranks."""
    overlap_gradients: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass still runs."""
    overlap_parameters: bool = False
    """Gather updated weights while the next forward pass runs; needs the two above."""


class Fp8(Strict):
    """Matrix products of the transformer blocks in 8 bits: Transformer Engine and compute capability 8.9 or later."""

    recipe: Literal["delayed", "tensorwise", "blockwise"]
    """Scaling: by the largest value of past steps (for benchmarks: no job takes it, as checkpoints do not carry those),
    of the tensor itself, or of each block (9.0 and CUDA 12.9)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """`hybrid`: e4m3 forward and e5m2 for gradients; `e4m3`: for both, which suits `blockwise`."""
    bf16_first_layers: int = Field(default=0, ge=0)
    """Blocks at the beginning of the model that stay in bf16; not with `delayed`."""
    bf16_last_layers: int = Field(default=0, ge=0)
    """Blocks at its end that stay in bf16; not with `delayed`."""


class Recompute(Strict):
    """What the backward pass computes again rather than keep in memory: the same numbers, for time."""

    mode: Literal["none", "selective", "full"] = "none"
    """`selective`: parts of each block, as `modules` says; `full`: whole blocks, of which only the input is kept."""
    modules: list[Literal["core_attn", "mlp"]] = Field(default=["core_attn"], min_length=1)
    """With `selective`: the parts, in Megatron's words. Flash and fused attention keep none of `core_attn` anyway, so
    that it saves memory with unfused attention alone."""
    layers: Positive | None = None
    """With `full`: how many blocks of each pipeline stage, the first ones; without it, all."""


class Kernels(Strict):
    """Which implementations are used. `auto` takes the best that the machine has; a name that it lacks is an error."""

    layers: Literal["auto", "transformer-engine", "megatron"] = "auto"
    """Transformer Engine's fused layers, or Megatron's plain ones."""
    attention: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """With Transformer Engine: the flash-attn package, cuDNN, or plain torch; Megatron's layers know only the last."""
    rotary: Literal["auto", "fused", "unfused"] = "auto"
    """The rotation of queries and keys in one kernel, with sines and cosines in float32, which `unfused` rounds to the
    run's precision; needs Transformer Engine."""
    activation: Literal["auto", "fused", "unfused"] = "auto"
    """SwiGLU and its bias in one compiled kernel, and biases with what they are added to; needs a GPU and Triton."""
    cross_entropy: Literal["auto", "fused", "unfused"] = "auto"
    """The loss without a float32 copy of all logits; needs Transformer Engine and Triton."""
    gradient_accumulation: Literal["auto", "fused", "unfused"] = "auto"
    """Weight gradients added to the float32 buffer inside the matrix product; Transformer Engine or NVIDIA's apex."""
