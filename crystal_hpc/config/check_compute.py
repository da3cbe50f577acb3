"""What the keys of `compute` must agree on, with each other and with the model, whatever the machine.

Part of `check`. What the machine must have is `model.precision`'s concern, when a job starts.
"""

from collections.abc import Iterator

from crystal_hpc.config.compute import Recompute
from crystal_hpc.config.schema import Run


def problems(run: Run) -> Iterator[str]:
    """A line for each thing that cannot work."""
    yield from _layout(run)
    yield from _kernels(run)
    yield from _recompute(run)
    if run.fp8:
        yield from _fp8(run)


def _layout(run: Run) -> Iterator[str]:
    parallel = run.parallel
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence: needs parallel.tensor > 1; leave it out"
    if parallel.overlap_parameters and not (parallel.distributed_optimizer and parallel.overlap_gradients):
        yield "parallel.overlap_parameters: needs distributed_optimizer and overlap_gradients; set both to true"
    pieces = parallel.context * (2 if parallel.context > 1 else 1) * (parallel.tensor if parallel.sequence else 1)
    for index, phase in enumerate(run.phases):
        if phase.sequence_length % pieces:
            yield (
                f"phases.{index}.sequence_length: {phase.sequence_length} is not a multiple of {pieces}, into which "
                f"parallel.context = {parallel.context} and parallel.sequence cut it"
            )


def _kernels(run: Run) -> Iterator[str]:
    kernels = run.kernels
    if kernels.layers == "megatron":
        if kernels.attention in ("flash", "fused"):
            yield f"kernels.attention: {kernels.attention} needs Transformer Engine, and kernels.layers is megatron"
        if run.parallel.context > 1:
            yield "parallel.context: more than 1 needs Transformer Engine, and kernels.layers is megatron"
    if run.parallel.context > 1 and (run.precision == "fp32" or kernels.attention == "unfused"):
        yield "parallel.context: more than 1 needs flash or fused attention, in bf16; unfused attention knows one piece"
    if run.precision == "fp32" and kernels.attention in ("flash", "fused"):
        yield f"kernels.attention: {kernels.attention} computes in 16 bits; make precision bf16"
    if run.deterministic and kernels.cross_entropy == "fused":
        yield "kernels.cross_entropy: Megatron knows no deterministic fused one; leave it out"


def _recompute(run: Run) -> Iterator[str]:
    recompute, blocks = run.recompute, run.model.layers // run.parallel.pipeline
    if recompute.layers and recompute.mode != "full":
        yield f"recompute.layers: is for mode: full, and the mode is {recompute.mode}"
    elif recompute.layers and recompute.layers > blocks:
        yield f"recompute.layers: {recompute.layers} is more than the {blocks} blocks of a pipeline stage"
    if recompute.mode != "selective" and recompute.modules != Recompute().modules:
        yield f"recompute.modules: is for mode: selective, and the mode is {recompute.mode}"


def _fp8(run: Run) -> Iterator[str]:
    fp8, model, parallel = run.fp8, run.model, run.parallel
    assert fp8
    if run.precision != "bf16":
        yield f"fp8: what is not in 8 bits is in bf16; make precision bf16, not {run.precision}"
    if run.kernels.layers == "megatron":
        yield "fp8: needs Transformer Engine, and kernels.layers is megatron"
    kept = fp8.bf16_first_layers, fp8.bf16_last_layers
    blocks = model.layers // parallel.pipeline
    if fp8.recipe == "delayed" and any(kept):
        yield "fp8.bf16_first_layers, bf16_last_layers: recipe: delayed scales all blocks; choose tensorwise"
    if max(kept) > blocks or sum(kept) >= model.layers:
        yield f"fp8: {kept[0]} + {kept[1]} blocks in bf16 do not fit {model.layers} in stages of {blocks}; keep fewer"
    # Of matrix products in 8 bits every dimension is cut into vectors of 16, or into blocks. The feed-forward width is
    # padded to fit (`memory.padded_ffn`); these are not.
    multiple = 128 if fp8.recipe == "blockwise" else 16
    share = multiple * parallel.tensor
    if model.hidden % share:
        yield f"model.hidden: {model.hidden} is not a multiple of {share}, which fp8.recipe: {fp8.recipe} needs"
    ranks = parallel.context * (parallel.tensor if parallel.sequence else 1)
    for index, phase in enumerate(run.phases):
        tokens = phase.sequence_length * parallel.micro_batch
        if tokens % (multiple * ranks):
            yield (
                f"phases.{index}.sequence_length: times parallel.micro_batch it is {tokens}, no multiple of "
                f"{multiple * ranks}, which fp8.recipe: {fp8.recipe} needs"
            )
