"""What GPUs can do at best: the peaks that model FLOPs utilisation is measured against, and their memory.

Dense peaks of the tensor cores from NVIDIA's data sheets, which print twice as much, "with sparsity". A device is known
by exactly the name that CUDA gives it, so that a MIG slice or a card that is not here has no utilisation rather than a
wrong one. No torch: `crystal plan` reads this on a login node.
"""

from dataclasses import dataclass

from crystal_hpc.config.schema import Run

TERA = 10**12
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A GPU: its names in CUDA, dense BF16 and FP8 peaks in FLOP/s (None: no FP8), and memory in bytes."""

    names: tuple[str, ...]
    bf16: float
    fp8: float | None
    memory: int


def _device(bf16: float, fp8: float | None, memory: int, *names: str) -> Device:
    return Device(names, bf16 * TERA, None if fp8 is None else fp8 * TERA, memory * GIB)


DEVICES = {
    # NVIDIA A100 data sheet (2021)
    "a100-40gb": _device(312, None, 40, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    "a100-80gb": _device(312, None, 80, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    # NVIDIA L40S data sheet (2023); 48 GB less what error correction takes
    "l40s": _device(362.05, 733, 45, "NVIDIA L40S"),
    # NVIDIA H100 data sheet, and the Hopper white paper (2022) for the digits
    "h100-sxm": _device(989.4, 1978.9, 80, "NVIDIA H100 80GB HBM3"),
    "h100-pcie": _device(756, 1513, 80, "NVIDIA H100 PCIe"),
    "h100-nvl": _device(835.5, 1670.5, 94, "NVIDIA H100 NVL"),
    # NVIDIA GH200 data sheet (2023): an H100 beside a Grace CPU
    "gh200": _device(989.4, 1978.9, 96, "NVIDIA GH200 480GB"),
    # NVIDIA H200 data sheet (2024); its 141 GB are 140 GiB to CUDA, of which it keeps some
    "h200": _device(989.4, 1978.9, 140, "NVIDIA H200"),
    "h200-nvl": _device(835.5, 1670.5, 140, "NVIDIA H200 NVL"),
    # NVIDIA HGX B200 data sheet, an eighth of the board; GB200 NVL72 data sheet, a 72nd of the rack
    "b200": _device(2250, 4500, 180, "NVIDIA B200"),
    "gb200": _device(2500, 5000, 186, "NVIDIA GB200"),
}


def find(cuda_name: str) -> Device | None:
    """The device that CUDA calls so; None for one that is not in the table."""
    return next((device for device in DEVICES.values() if cuda_name in device.names), None)


def peak(device: Device | None, run: Run) -> float | None:
    """FLOP/s that the run's matrix products could reach: the FP8 peak with `fp8`, else BF16's; None if not known.

    Float32 runs have none: what they use (TF32 or not) is torch's setting.
    """
    if device is None or run.precision != "bf16":
        return None
    return device.fp8 if run.fp8 else device.bf16
