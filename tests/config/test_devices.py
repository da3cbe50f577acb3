"""Peaks of devices: only what is known for sure."""

import pytest

from crystal_hpc.config import devices
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run

DEMO = "configs/crystal-demo.yaml"


def demo(*overrides: str) -> Run:
    from pathlib import Path

    return load_run(Path(__file__).parents[2] / DEMO, overrides)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_a_device_is_known_by_the_name_that_cuda_gives_it(name: str, bf16: float) -> None:
    assert devices.peak(devices.find(name), demo("precision=bf16")) == bf16


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 3g.40gb", "Tesla V100-SXM2-32GB", "H100", ""])
def test_a_slice_of_a_device_and_one_that_is_not_in_the_table_have_no_peak(name: str) -> None:
    assert devices.find(name) is None
    assert devices.peak(devices.find(name), demo("precision=bf16")) is None


def test_the_peak_is_that_of_the_format_in_which_the_run_multiplies() -> None:
    h100, a100 = devices.DEVICES["h100-sxm"], devices.DEVICES["a100-80gb"]
    eight = demo("precision=bf16", "fp8={recipe: delayed}")
    assert (devices.peak(h100, eight), devices.peak(a100, eight)) == (1978.9e12, None)
    assert devices.peak(h100, demo("precision=fp32")) is None, "TF32 or not is not the run's to say"


def test_no_two_devices_share_a_name_and_fp8_is_twice_bf16() -> None:
    names = [name for device in devices.DEVICES.values() for name in device.names]
    assert len(set(names)) == len(names)
    for key, device in devices.DEVICES.items():
        assert device.fp8 is None or device.fp8 == pytest.approx(2 * device.bf16, rel=0.02), key
