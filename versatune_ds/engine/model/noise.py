"""NEFTune: uniform noise on the embeddings of a pack in training (arXiv:2310.05914).

Every element of an embedding of a sample of L tokens gets a number from [-s, s), s = alpha / sqrt(L d), d
the hidden size. In the paper L is the padded length of a batch; in a pack each sample has its own.

The numbers follow from the run's seed, the step, and the pack's number in the step over all ranks: a resumed
run draws them again, on any number of ranks. (CUDA and the CPU draw different ones.)

What is not covered: ranks that share a pack (refused in `config/schema.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from versatune_ds.data.plan.balance import rank_number
from versatune_ds.foundations.files import canonical_hash

Place = tuple[int, int, int, int]
"""Step, micro-step in it, data-parallel rank and ranks of a pack."""


class EmbeddingNoise:
    """Adds noise to what the model's input embedding returns, by a hook, once after each `prepare`."""

    def __init__(self, embedding: nn.Module, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self._next: tuple[torch.Tensor, torch.Generator] | None = None
        embedding.register_forward_hook(self._add)

    def prepare(self, sample_ids: torch.Tensor, num_samples: int, place: Place) -> None:
        """The next call is for a pack of `sample_ids`, integer [T], -1 in padding, which gets no noise."""
        slots = sample_ids.long() + 1
        lengths = torch.zeros(num_samples + 1, device=sample_ids.device)
        lengths.index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32))
        scale = self.alpha * lengths.clamp(min=1).rsqrt()
        scale[0] = 0.0
        step, *rank = place
        seed = int(canonical_hash([self.seed, step, rank_number(*rank)])[:15], 16)
        self._next = scale[slots], torch.Generator(sample_ids.device).manual_seed(seed)

    def _add(self, embedding: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        """The hook; `output` is [1, T, d]."""
        if self._next is None:
            return None
        (scale, generator), self._next = self._next, None
        noise = torch.empty(output.shape, device=output.device).uniform_(-1, 1, generator=generator)
        return output + (noise * scale.view(1, -1, 1) / output.shape[-1] ** 0.5).to(output.dtype)
