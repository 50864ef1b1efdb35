"""Domain sums of a step, gathered on the device and reduced once.

Every micro-batch adds its per-sample sums to one float64 buffer without asking the host to wait. At the step
boundary a single all-reduce carries the buffer together with the facts the ranks must agree on: whether any
loss was not finite, and what any rank has to say (`Flags`). What comes back is the same on all ranks, so
every decision taken from it is too.

What is not covered: what is done with the sums (`versatune_ds.domain`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from versatune_ds.domain.statistics import NUM_ROWS, DomainSums, SumRow, sample_terms
from versatune_ds.engine.model.adapters import BaseKL
from versatune_ds.engine.model.router import Routers
from versatune_ds.foundations import distributed
from versatune_kernels import LossOutput


class Flags(NamedTuple):
    """What a rank says at a step boundary; agreed upon, each is true when any rank said so."""

    stop: bool = False
    """Asked to stop."""
    save: bool = False
    """A checkpoint is due by the clock (rank 0's counts)."""
    writing: bool = False
    """Still writing a checkpoint in the background."""
    failed: bool = False
    """Could not write it."""


NO_FLAGS = Flags()


WEIGHTED_LOSS, WEIGHT = range(2)
"""Rows of `StepTotals.weighted`."""


class StepTotals(NamedTuple):
    """What all ranks together know about a step."""

    sums: DomainSums | None
    """Reduced sums per domain; None when a loss was not finite."""
    flags: Flags
    """What any rank has said."""
    routers: npt.NDArray[np.float64] | None = None
    """What `Routers.take` gave, added up; None without routers."""
    weighted: npt.NDArray[np.float64] | None = None
    """float64[2, k]: per domain the sum of weight x loss (nats), and of weights, over all labels."""
    base_kl: npt.NDArray[np.float64] | None = None
    """float64[2, k]: per domain the sum of KL(base || model) (nats), and the compared tokens; None without
    `model.kl_to_base`."""


class StepStatistics:
    """The [NUM_ROWS, k] buffer of one step, plus flags.

    Args:
        routers: of a mixture of experts, whose counts go along.
        counts: False on all but one of the ranks that share a pack: they have the same sums of samples.
        base_kl: the model's, whose compared tokens go along.
    """

    def __init__(
        self,
        num_domains: int,
        device: torch.device,
        routers: Routers | None = None,
        counts: bool = True,
        base_kl: BaseKL | None = None,
    ) -> None:
        self.num_domains, self.routers, self.counts, self.base_kl = num_domains, routers, counts, base_kl
        if routers is not None:
            routers.take()  # what a rehearsal has left
        if base_kl is not None:
            base_kl.take()
        self._sums = torch.zeros(NUM_ROWS, num_domains, dtype=torch.float64, device=device)
        self._weighted = torch.zeros(2, num_domains, dtype=torch.float64, device=device)
        self._kl = torch.zeros(2, num_domains, dtype=torch.float64, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.float64, device=device)

    def add(
        self,
        out: LossOutput,
        sample_domains: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
    ) -> None:
        """Add a micro-batch; no host synchronisation, fixed summation order.

        Args:
            out: `sample_loss` float64[S] in nats, `sample_tokens` int64[S], `token_loss` float32[T].
            sample_domains: int[S], the domain id of each sample.
            sample_ids: int[T], the sample of each position, -1 in padding; with `token_weight`.
            token_weight: float[T], 0 without a label; None: all weights are 1.
        """
        loss, tokens = out.sample_loss.double(), out.sample_tokens.double()
        self._nonfinite += (~torch.isfinite(loss).all()).double()
        domains = torch.arange(self.num_domains, device=sample_domains.device).unsqueeze(1)
        of_domain = sample_domains.unsqueeze(0) == domains  # [k, S]
        per_sample = torch.stack(sample_terms(loss, tokens)).unsqueeze(1)  # [m, 1, S]
        # where, not a product with 0/1: a NaN of one domain must not reach the others
        sums = torch.where(of_domain & self.counts, per_sample, 0.0).sum(-1)
        self._sums += sums
        if self.base_kl is not None and (compared := self.base_kl.take()) is not None:
            self._nonfinite += (~torch.isfinite(compared.kl).all()).double()
            per_token = torch.stack([compared.kl.double(), torch.ones_like(compared.kl).double()])
            of_token = sample_domains[compared.samples] == domains  # [k, n]
            self._kl += torch.where(of_token, per_token.unsqueeze(1), 0.0).sum(-1)
        if token_weight is None or sample_ids is None:
            self._weighted += sums[SumRow.LOSS_SUM : SumRow.TOKENS + 1]
            return
        of_position = (sample_domains[sample_ids.clamp(min=0)] == domains) & (sample_ids >= 0)  # [k, T]
        weight = token_weight.double()
        per_token = torch.stack([weight * out.token_loss.double(), weight]).unsqueeze(1)  # [2, 1, T]
        self._weighted += torch.where(of_position, per_token, 0.0).sum(-1)

    def reduce(self, flags: Flags = NO_FLAGS) -> StepTotals:
        """Sum over ranks and start anew. The one collective, and the one wait of the host, of a step."""
        # filled on the device: a copy from the host would wait for it
        votes = [torch.full_like(self._nonfinite, float(flag)) for flag in flags]
        first = torch.stack([self._nonfinite, *votes])
        counts = [] if self.routers is None else [self.routers.take()]
        more = [self._weighted.flatten(), self._kl.flatten()]
        packed = torch.cat([self._sums.flatten(), first, *more, *counts])
        buffer = distributed.all_reduce_sum(packed).cpu().numpy()
        self._sums.zero_()
        self._weighted.zero_()
        self._kl.zero_()
        self._nonfinite.zero_()
        count = self._sums.numel()
        sums = buffer[:count].reshape(NUM_ROWS, self.num_domains)
        finite = buffer[count] == 0 and bool(np.isfinite(sums).all())
        sizes = np.cumsum([len(flags), self._weighted.numel(), self._kl.numel()])
        said, weighted, kl, routers = np.split(buffer[count + 1 :], sizes)
        agreed = Flags(*(bool(n > 0) for n in said))
        return StepTotals(
            DomainSums(sums) if finite else None,
            agreed,
            routers if counts else None,
            weighted.reshape(2, self.num_domains) if finite else None,
            kl.reshape(2, self.num_domains) if finite and self.base_kl is not None else None,
        )
