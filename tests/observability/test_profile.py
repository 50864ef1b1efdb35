"""What a profile says of the time: items by their own seconds, on the side that was asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from versatune_ds.config.load import validate_settings
from versatune_ds.config.schema import Train
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.observability.profile import TOP, StepProfiler, summary


def event(key, device=DeviceType.CPU, host=0.0, own=0.0, device_own=0.0, phase=False):
    times = {"cpu_time_total": host, "self_cpu_time_total": own, "self_device_time_total": device_own}
    return SimpleNamespace(key=key, device_type=device, is_user_annotation=phase, count=2, **times)


EVENTS = [
    event("forward", host=5e6, own=1e6, phase=True),
    event("forward", DeviceType.CUDA, device_own=4e6, phase=True),
    event("aten::mm", own=2e6, device_own=3e6),
    event("gemm", DeviceType.CUDA, device_own=3e6),
    *(event(f"k{i}", DeviceType.CUDA, device_own=float(i)) for i in range(TOP)),
]


def test_on_cuda_items_are_kernels_and_phases_are_of_the_host():
    found = summary(EVENTS, 6.0, on_cuda=True)
    assert found["phases"] == [{"name": "forward", "seconds": 5.0, "calls": 2}]
    assert [item["name"] for item in found["items"]] == ["gemm", *(f"k{i}" for i in range(9, 0, -1))]
    assert found["items"][0]["seconds"] == 3.0


def test_on_a_cpu_items_are_operators():
    assert summary(EVENTS, 6.0, on_cuda=False)["items"] == [{"name": "aten::mm", "seconds": 2.0, "calls": 2}]


def test_a_resumed_run_that_is_past_them_profiles_nothing_and_says_nothing(tmp_path, caplog):
    profiler = StepProfiler(tmp_path, (2, 3))
    with profiler.step(4):
        pass
    profiler.close()
    assert caplog.text == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "said"),
    [([3, 2], "first and last"), ([1, 40], "at most 20"), ([9, 12], "behind max_steps 10")],
)
def test_steps_that_cannot_be_profiled_are_refused(steps, said):
    with pytest.raises(ConfigError, match=said):
        validate_settings(Train, {"max_steps": 10, "profile": {"steps": steps}}, "test")
