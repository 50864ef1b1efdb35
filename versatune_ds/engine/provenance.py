"""On what and with which versions something ran, for run.json, evaluations and benchmarks; what
changed since.

What is not covered: finding versions and the commit (`foundations/machine.py`).
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

import versatune_ds
from versatune_ds.config.load import load_config
from versatune_ds.config.schema import Config
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.backend.parameters import parameter_counts
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import canonical_hash
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.machine import git_commit, installed
from versatune_ds.observability.throughput import peak_tflops

log = get_logger(__name__)

REQUIRED = ("torch", "transformers", "deepspeed")
OPTIONAL = ("triton", "flash_attn")
"""Distributions of what computes, by the names in run.json."""


def describe_hardware(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "devices_per_node": torch.cuda.device_count() if cuda else 0,
        "cpu_count": os.cpu_count(),
    }


def describe_run(config: Config, backend: Backend, total_steps: int) -> dict[str, Any]:
    """run.json: what runs, on what, since when; for the report and for people."""
    adapter = config.model.adapter
    total, outside_embeddings = parameter_counts(backend.model)
    return {
        "name": config.run.dir.resolve().name,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": describe_versions(),
        "commit": git_commit(),
        "hardware": describe_hardware(backend.device),
        "world_size": distributed.world_size(),
        "model": {
            "source": config.model.source,
            "type": backend.model.lm.config.model_type,
            "dtype": config.model.dtype,
            "attention": backend.attention.implementation,
            "adapter": f"{adapter.kind}, rank {adapter.rank}" if adapter else None,
        },
        "num_parameters": total,
        "num_parameters_trained": parameter_counts(backend.model, trained=True)[0],
        "num_parameters_nonembedding": outside_embeddings,
        "domains": config.domains.names,
        "total_steps": total_steps,
        "config_fingerprint": canonical_hash(config.model_dump(mode="json")),
    }


def accelerator_peak_tflops(config: Config, device: torch.device) -> float | None:
    """Dense peak of one accelerator in TFLOP/s, for MFU; None on a CPU and, with a warning, if unknown."""
    name = describe_hardware(device)["device"]
    peak = config.metrics.peak_tflops or peak_tflops(name)
    if peak is None and device.type != "cpu":
        log.warning(
            "the dense peak of %s is not known, so there is no MFU; set metrics.peak_tflops to what its "
            "data sheet says for model.dtype without sparsity",
            name,
        )
    return peak


def describe_versions() -> dict[str, str]:
    """Versions of what computes: ours, torch, transformers and DeepSpeed, and some that may be missing."""
    return {"versatune_ds": versatune_ds.__version__, **installed((*REQUIRED, *OPTIONAL))}


def note_changes(config: Config) -> None:
    """Say which settings differ from those the folder was last run with."""
    path = config.run.dir / constants.RESOLVED_CONFIG_FILE
    if not path.is_file():
        return
    try:
        old, new = (c.model_dump(mode="json") for c in (load_config(path), config))
    except ConfigError:  # written by a version with other settings
        log.warning("%s cannot be read by this version; it will be replaced", path)
        return
    for key, was, now in changed_settings(old, new):
        log.warning("setting %s was %s and is now %s", key, was, now)


def changed_settings(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of what is not the same in two JSON values, in alphabetical order."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(place, old, new)]
    prefix = f"{place}." if place else ""
    keys = sorted(old.keys() | new.keys())
    return [each for key in keys for each in changed_settings(old.get(key), new.get(key), prefix + key)]
