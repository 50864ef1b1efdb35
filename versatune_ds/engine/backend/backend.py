"""What the loop asks of whatever holds the parameters, their gradients and the optimizer's state.

The loop, evaluation, checkpoints and the export know this and nothing more. `deepspeed_backend.py` does it
with DeepSpeed, and `tests/support/plain_backend.py` in plain PyTorch on one rank.

What is not covered: how a backend is built, and the ranks' agreement about a step (`engine/statistics.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_kernels import LossOutput

Write = Callable[[Any, Path], None]
"""Takes what a file is to hold (bytes, or anything for torch.save) and its path. Never raises."""


def all_names(name: str) -> bool:
    """Every parameter is wanted."""
    return True


class Backend(Protocol):
    """A model with its gradients and optimizer, on all ranks.

    What says that it is a collective is called by all ranks, in the same order.
    """

    @property
    def model(self) -> PackedCausalLM:
        """The model itself; its parameters may be partitioned over the ranks."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    @property
    def attention(self) -> AttentionChoice:
        """How samples of a pack are kept apart."""

    @property
    def ranks(self) -> Ranks:
        """Who shares out data, and who shares a pack."""

    @property
    def layout(self) -> dict[str, Any]:
        """What decides how state is laid out in files, beside the number of ranks; JSON-serialisable."""

    def forward(self, **inputs: Any) -> LossOutput:
        """Loss of one pack (`packed_lm.model_inputs`); a collective."""

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add the gradient of a micro-batch, to be averaged over all ranks; a collective.

        Args:
            is_last: the micro-batch is the last one of its step.
        """

    def gradients_are_finite(self) -> bool:
        """False if the step's gradients hold NaN or infinity and `step` would not see it itself."""

    def step(self, learning_rate: float) -> bool:
        """Clip, take the optimizer step, forget the gradients; False if it was not applied. A collective."""

    def discard(self) -> None:
        """Forget the gradients of the current step, as if its micro-batches had never run."""

    def grad_norm(self) -> float | None:
        """Norm of the last applied step's gradients over all ranks, before clipping."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Within it the model does not train, and nothing is kept for a backward."""

    def parameters(self, wanted: Callable[[str], bool] = all_names) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter with a wanted name, once and whole.

        Yields:
            Its first name in `model`, and a tensor that is valid until the next one.
        """

    def save(self, folder: Path, write: Write) -> None:
        """Hand this rank's part of the state to `write`, as files in `folder`; a collective."""

    def load(self, folder: Path, layout: Mapping[str, Any], world_size: int) -> None:
        """Take over the state that a run with this layout on so many ranks has saved; a collective.

        Raises:
            StateError: it cannot be taken over.
        """

    def close(self) -> None:
        """Let go of the memory."""
