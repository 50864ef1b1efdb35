"""Held-out loss per domain, on all ranks, forward only.

The samples of all domains share packs; every rank runs the same number of packs (empty ones at the end),
because under ZeRO-3 each forward is a collective. Sums are reduced once and divided once.

`evaluate` gives the sums of a run in training; `evaluate_samples` also every sample's loss, for comparisons
sample by sample.

What is not covered: benchmark tasks (`apps/evaluate/lm_eval.py`) and generation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.data.collate import Batch, collate, rows_of
from versatune_ds.data.plan.balance import by_cost, rank_packs
from versatune_ds.data.plan.packing import Pack, pack_all
from versatune_ds.domain.probes.samples import SampleLosses
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.model.packed_lm import model_inputs
from versatune_ds.engine.phases import phase
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import DataError
from versatune_kernels import LossOutput


class HeldOutLosses(NamedTuple):
    """Result of an evaluation."""

    sums: DomainSums
    samples: np.ndarray
    """int64[k]: held-out samples per domain."""
    seconds: float


def pads_packs(backend: Backend) -> bool:
    """Whether every pack is filled up to `batch.pack_len`: GPUs and compiled layers want one shape, on a CPU
    each position costs its time."""
    return backend.device.type != "cpu" or backend.model.is_compiled


class HeldOut:
    """The held-out packs of this rank, planned once, collated as they are used.

    Args:
        caches: held-out cache per domain, None for a domain without held-out data.
        pack_len: tokens in a pack.
        max_samples: first n samples of each domain; None for all.
        pad_id: token id of padding.
        ranks: who shares them out, and who shares a pack.

    Raises:
        DataError: no domain has held-out data.
    """

    def __init__(
        self,
        caches: Sequence[TokenCache | None],
        pack_len: int,
        max_samples: int | None,
        pad_id: int,
        ranks: Ranks,
    ) -> None:
        self.caches = caches
        self.pack_len = pack_len
        self.pad_id = pad_id
        counts = [0 if cache is None else len(cache) for cache in caches]
        self.samples = np.array([n if max_samples is None else min(n, max_samples) for n in counts])
        if not self.samples.any():
            raise DataError("no domain to evaluate has held-out data; give data.eval")
        self.packs, self.part = self._rank_packs(ranks), ranks.sp

    def _rank_packs(self, ranks: Ranks) -> list[Pack]:
        """This rank's packs; ranks get equally many."""
        domains = np.concatenate([np.full(n, d, dtype=np.int32) for d, n in enumerate(self.samples)])
        indices = np.concatenate([np.arange(n, dtype=np.int64) for n in self.samples])
        lengths = np.concatenate(
            [
                cache.lengths[:n]
                for cache, n in zip(self.caches, self.samples, strict=True)
                if cache is not None
            ]
        )
        packs = [
            Pack(domains[chosen], indices[chosen], lengths[chosen])
            for chosen in pack_all(lengths, self.pack_len)
        ]
        empty = Pack(domains[:0], indices[:0], lengths[:0])
        packs += [empty] * (-len(packs) % ranks.dp.size)
        return rank_packs(by_cost(packs, self.pack_len), *ranks.dp)


def evaluate(backend: Backend, held_out: HeldOut, num_domains: int) -> HeldOutLosses:
    """Loss sums of the held-out data, reduced over ranks; a collective."""
    start = time.perf_counter()
    statistics = StepStatistics(num_domains, backend.device, counts=backend.ranks.sp.rank == 0)
    for _, batch, out in _forward(backend, held_out):
        statistics.add(out, batch.sample_domains)
    totals = statistics.reduce()
    sums = totals.sums if totals.sums is not None else DomainSums.zeros(num_domains)
    return HeldOutLosses(sums, held_out.samples, time.perf_counter() - start)


def evaluate_samples(backend: Backend, held_out: HeldOut) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Loss and size of every held-out sample; a collective.

    Returns:
        Per domain, in cache order: summed token losses float64[n] in nats, supervised tokens int64[n].
    """
    mine = [
        (pack.domains, pack.samples, out.sample_loss, out.sample_tokens)
        for pack, _, out in _forward(backend, held_out)
    ]
    on_host = [(d, s, loss.double().cpu().numpy(), n.cpu().numpy()) for d, s, loss, n in mine]
    losses = [np.full(n, np.nan) for n in held_out.samples]
    tokens = [np.zeros(n, dtype=np.int64) for n in held_out.samples]
    for packs in distributed.gather_objects(on_host):
        for domains, samples, loss, count in packs:
            for domain in np.unique(domains):
                of_domain = domains == domain
                losses[domain][samples[of_domain]] = loss[of_domain]
                tokens[domain][samples[of_domain]] = count[of_domain]
    return losses, tokens


def probe_losses(backend: Backend, held_out: HeldOut, *, each_sample: bool) -> DomainSums | SampleLosses:
    """What `WeightController.update` takes: sums, or the losses of every sample; a collective."""
    if each_sample:
        return SampleLosses(*evaluate_samples(backend, held_out))
    return evaluate(backend, held_out, len(held_out.samples)).sums


def _forward(backend: Backend, held_out: HeldOut) -> Iterator[tuple[Pack, Batch, LossOutput]]:
    """Every pack of this rank with its batch on the device and the model's output."""
    pads = pads_packs(backend)
    with backend.evaluating():
        for i, pack in enumerate(held_out.packs):
            with phase("evaluation", detail=f"of pack {i + 1} of {len(held_out.packs)}"):
                rows = rows_of(held_out.pack_len if pads else pack.length, held_out.part.size)
                batch = collate(pack, held_out.caches, rows, held_out.pad_id).part(*held_out.part)
                out = backend.forward(**model_inputs(batch.to(backend.device), 1.0))
            yield pack, batch, out
