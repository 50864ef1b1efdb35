"""MFU against numbers worked by hand; the peak table by the names that drivers report."""

import pytest

from versatune_ds.observability.throughput import mfu, peak_memory_gib, peak_tflops


def test_mfu_by_hand():
    # 8e14 FLOPs in 2 s on 4 devices of 200 TFLOP/s: 8e14 / (2 x 4 x 2e14) = 0.5
    assert mfu(8e14, 2.0, 4, 200.0) == 0.5


def test_mfu_is_none_without_peak_or_time():
    assert mfu(8e14, 2.0, 4, None) is None
    assert mfu(8e14, 0.0, 4, 200.0) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 3060", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(name, peak):
    assert peak_tflops(name) == peak


def test_peak_memory_is_that_of_this_process():
    memory = peak_memory_gib()
    assert memory is not None and 0.005 < memory < 1000
