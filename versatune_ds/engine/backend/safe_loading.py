"""Loading files of torch without running code that may hide in them.

A file of `torch.save` is a pickle, and a pickle can call anything. DeepSpeed 0.19.8 opens its checkpoints
with `torch.load(..., weights_only=False)`, which allows that; a manifest of hashes only finds accidents: who
changes a file can change the manifest. `tensors_only` overrules DeepSpeed: within it torch unpickles
tensors, plain values and the few classes that DeepSpeed stores, and refuses everything else before it runs.

What is not covered: `torch.load` in other processes that a caller starts, and what the ranks of a job send
each other (pickled by torch; the network between them must be trusted).
"""

from __future__ import annotations

import copyreg
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from versatune_ds.foundations.errors import StateError

# Python 3.11.0 to 3.11.3 pickles a member of an enum as a call of getattr, and loading refuses such a call.
# DeepSpeed stores the ZeRO stage: from here on it is written by its value, as all other Pythons do it.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""torch reads it in every `torch.load`; it wins over `weights_only=False`."""


@contextmanager
def tensors_only(place: Path) -> Iterator[None]:
    """Within this block `torch.load` runs no code of a file, whoever calls it.

    Raises:
        StateError: a file holds something else than tensors, plain values and DeepSpeed's own classes.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(
            [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        ):
            yield
    except pickle.UnpicklingError as error:
        raise StateError(
            f"{place} holds more than tensors and was not loaded, because that could run code: "
            f"{_cause(error)} Use a checkpoint that this program wrote"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def _cause(error: Exception) -> str:
    """The sentence of torch's long text that names what was found."""
    lines = [line.strip() for line in str(error).splitlines()]
    found = [line for line in lines if line.startswith(("WeightsUnpickler error:", "Unsupported", "GLOBAL"))]
    return (found or lines or [type(error).__name__])[0].removeprefix("WeightsUnpickler error: ")
