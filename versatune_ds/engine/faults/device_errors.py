"""What an error of the device means for the user: no memory, or a value that a kernel refused.

Such an error comes up wherever the host next asks the device for something. Where the run was then is its
last mark (`engine/faults/watchdog.py`); which setting to lower is known here.

What is not covered: errors of collectives (`engine/faults/heartbeat.py`) and of the texts of `apps/detect`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from versatune_ds.config.schema import Config
from versatune_ds.engine.faults.watchdog import here
from versatune_ds.foundations.errors import ConfigError, VersaTuneError
from versatune_ds.observability.throughput import peak_memory_gib
from versatune_kernels import KernelError

NO_HOST_MEMORY = "can't allocate memory"
DEVICE_ASSERT = "device-side assert"


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Within it, errors of the device become errors for the user.

    Raises:
        ConfigError: out of memory, on the device or (as torch's CPU allocator says it) in RAM.
        VersaTuneError: a kernel refused a value.
    """
    try:
        yield
    except KernelError as error:
        raise VersaTuneError(f"{here()}: {error}") from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or NO_HOST_MEMORY in str(error):
            raise ConfigError(out_of_memory(config, str(here()), str(error))) from error
        if DEVICE_ASSERT not in str(error):
            raise
        raise VersaTuneError(
            f"{here()}: a kernel met a value that it cannot work with, mostly a token or label that is not "
            "in the model's vocabulary; the lines above name the kernel. CUDA_LAUNCH_BLOCKING=1 shows where; "
            f"check that the data was prepared with this model's tokenizer ({config.model.source})"
        ) from error


def out_of_memory(config: Config, where: str, reason: str) -> str:
    """What to lower, with the settings in force; of `reason`, torch's text, the first line is told."""
    batch, answers = config.batch, config.evaluation.generate
    cures = [
        f"batch.pack_len (now {batch.pack_len})",
        f"batch.sequence_parallel, raised (now {batch.sequence_parallel}; ranks that share a pack)",
    ]
    if config.model.activation_checkpointing not in ("all", "offload"):
        cures.append(
            f"model.activation_checkpointing: all (now {config.model.activation_checkpointing}; less memory, "
            "more compute)"
        )
    if config.model.dtype == "fp32":
        cures.append("model.dtype: bf16")
    if answers is not None:
        cures.append(f"evaluation.generate.batch_size (now {answers.batch_size}; for answers)")
    cures.append("ZeRO-3 with offload (configs/deepspeed/zero3_offload.json), or more ranks")
    return (
        f"out of memory in {where} (peak {peak_memory_gib():.2f} GiB so far: {reason.splitlines()[0]}). "
        f"Lower or change: {'; '.join(cures)}"
    )
