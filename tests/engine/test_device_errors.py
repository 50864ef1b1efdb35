"""Errors of the device become texts that say where the run was and what to change."""

from __future__ import annotations

import pytest
import torch
from step_cases import settings

from versatune_ds.config.load import validate_config
from versatune_ds.engine.faults.device_errors import explained
from versatune_ds.engine.faults.watchdog import mark
from versatune_ds.foundations.errors import ConfigError, VersaTuneError
from versatune_kernels import KernelError

CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...\nmore"
CPU_TEXT = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried ..."


def raising(error: Exception, **model: str) -> None:
    raw = settings({"source": "a/model", **model}, ((0,), (1,)), {"stage": 3})
    mark("forward and backward of pack 1 of 2", 7)
    with explained(validate_config(raw, "test")):
        raise error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_TEXT), RuntimeError(CPU_TEXT)])
def test_out_of_memory_names_the_place_and_the_settings_to_lower(error):
    with pytest.raises(ConfigError) as found:
        raising(error, dtype="fp32")
    text = str(found.value)
    assert text.startswith("out of memory in step 7, forward and backward of pack 1 of 2 (peak ")
    assert str(error).splitlines()[0] in text and "\n" not in text
    for cure in ("batch.pack_len (now 32)", "activation_checkpointing: all (now off", "model.dtype: bf16"):
        assert cure in text


def test_what_is_set_already_is_no_cure():
    with pytest.raises(ConfigError) as found:
        raising(torch.OutOfMemoryError(CUDA_TEXT), dtype="bf16", activation_checkpointing="all")
    assert "activation_checkpointing" not in str(found.value) and "dtype" not in str(found.value)


def test_a_value_that_a_kernel_refused_is_told_with_the_place():
    with pytest.raises(VersaTuneError, match=r"^step 7, forward .*: labels\[3\] is 99"):
        raising(KernelError("labels[3] is 99"))
    with pytest.raises(VersaTuneError, match=r"step 7, .*vocabulary.*tokenizer \(a/model\)"):
        raising(RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ..."))


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^something else$") as found:
        raising(RuntimeError("something else"))
    assert not isinstance(found.value, VersaTuneError)
