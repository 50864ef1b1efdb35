"""What is said about hardware and versions."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import versatune_ds
from versatune_ds.engine import provenance


def test_an_unknown_accelerator_has_no_peak_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(provenance, "describe_hardware", lambda device: {"device": "NVIDIA X1000"})
    unset, given = (SimpleNamespace(metrics=SimpleNamespace(peak_tflops=x)) for x in (None, 123.0))
    assert provenance.accelerator_peak_tflops(given, torch.device("cuda")) == 123.0
    assert provenance.accelerator_peak_tflops(unset, torch.device("cpu")) is None
    assert not caplog.records
    assert provenance.accelerator_peak_tflops(unset, torch.device("cuda")) is None
    assert "NVIDIA X1000 is not known" in caplog.text and "metrics.peak_tflops" in caplog.text


def test_versions_are_those_that_the_packages_say_of_themselves():
    import deepspeed
    import transformers

    versions = provenance.describe_versions()
    modules = {"torch": torch, "transformers": transformers, "deepspeed": deepspeed}
    assert versions.pop("versatune_ds") == versatune_ds.__version__
    for name, module in modules.items():
        assert versions.pop(name) == module.__version__
    assert versions.keys() <= set(provenance.OPTIONAL)


def test_missing_packages_are_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "OPTIONAL", ("no_such_package",))
    assert list(provenance.describe_versions()) == ["versatune_ds", *provenance.REQUIRED]
