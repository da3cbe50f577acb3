"""The memory of each GPU as text, the second half of `crystal plan`: what `config.memory` says of the run's layout."""

from collections.abc import Iterator

from crystal_hpc.config import derive
from crystal_hpc.config.devices import DEVICES, GIB
from crystal_hpc.config.memory import ALLOWANCE_SHARE, StageMemory, stages
from crystal_hpc.config.schema import Cluster, Phase, Run
from crystal_hpc.report.plan import note

MIB = 2**20
PARTS = ("weights", "gradients", "optimizer", "activations", "working")


def describe_memory(run: Run, cluster: Cluster | None = None) -> str:
    """A line a pipeline stage, then the largest; in the phase that takes most. `cluster` must fit the run's layout.

    Without a cluster, of a job with one data-parallel rank, which has the whole optimizer state to itself.
    """
    ranks = cluster.ranks if cluster else derive.model_parallel(run)
    phase, found = max(((phase, stages(run, phase, ranks)) for phase in run.phases), key=lambda pair: _most(pair[1]))
    device = DEVICES[cluster.gpu] if cluster and cluster.gpu else None
    largest = max(found, key=lambda stage: stage.total)
    needed = largest.total + largest.allowance
    lines = [
        f"memory of each GPU: {_layout(run, phase, ranks)}",
        *_table(found),
        f"largest: stage {largest.stage}, {_gib(largest.total)}; with an allowance of {_gib(largest.allowance)}: "
        f"{_gib(needed)}" + (f" of {_gib(device.memory)}" if device else ""),
    ]
    if device and cluster and needed > device.memory:
        lines += note(
            f"does not fit: {cluster.gpu}, the GPU of cluster {cluster.name!r}, has {_gib(device.memory)}, "
            f"{_gib(needed - device.memory)} less than stage {largest.stage} needs; choose a smaller "
            "parallel.micro_batch, recompute, or more ranks for tensor or pipeline"
        )
    lines += note(
        f"the allowance (2 GiB for driver, CUDA context and NCCL, {ALLOWANCE_SHARE:.0%} for fragmentation) is an "
        "assumption"
    )
    if run.kernels.layers != "megatron":
        lines += note("activations are those of Transformer Engine; Megatron's own layers keep attention scores, too")
        unfused = run.kernels.attention == "unfused" or run.precision == "fp32"
        if run.recompute.mode == "selective" and "core_attn" in run.recompute.modules and not unfused:
            lines += note(
                "recompute.modules: core_attn takes time and saves nothing here, as flash and fused attention keep no "
                "scores; choose mlp, or mode: full"
            )
    return "\n".join(lines)


def _most(found: list[StageMemory]) -> int:
    return max(stage.total for stage in found)


def _layout(run: Run, phase: Phase, ranks: int) -> str:
    parallel = run.parallel
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "CP": parallel.context}
    sizes = {name: size for name, size in sizes.items() if size > 1} | {"DP": derive.data_parallel(run, ranks)}
    rows = f"{parallel.micro_batch} x {phase.sequence_length:,} tokens"
    precision = f"fp8 ({run.fp8.recipe})" if run.fp8 else run.precision
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{ranks:,} {'rank' if ranks == 1 else 'ranks'} ({layout}), {precision}, micro-batches of {rows}"


def _table(found: list[StageMemory]) -> Iterator[str]:
    unit, name = (GIB, "GiB") if _most(found) >= GIB else (MIB, "MiB")
    yield _line(f"stage ({name})", "in flight", *PARTS, "sum")
    for stage in found:
        sizes = [*(getattr(stage, part) for part in PARTS), stage.total]
        yield _line(f"  {stage.stage}", str(stage.in_flight), *(f"{size / unit:.2f}" for size in sizes))


def _line(title: str, *cells: str) -> str:
    return f"{title:<14}" + "".join(f"{cell:>12}" for cell in cells)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
