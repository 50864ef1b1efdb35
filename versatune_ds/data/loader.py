"""The loader: plans and batches of one rank, prepared one step ahead by a thread.

While the caller computes step s, one thread plans step s + 1 from the state after s with the weights of s
and collates this rank's batches. `take(weights)` hands them out if these are still the weights; otherwise
they are thrown away and the step is planned again from the committed state. So no batch is ever drawn from
old weights, and `state` (what a checkpoint stores) is the state after the last plan that was taken: a plan
that was only prefetched has left no trace.

What is not covered: copies to the device (the engine does them), several threads or processes (planning and
reading a memory-mapped cache take little beside a step, see docs/planning.md for what was measured), and
agreement between ranks (plans are equal because their inputs are; the engine compares hashes of the weights).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from versatune_ds.data.collate import Batch, TokenSource, collate, compare, rows_of
from versatune_ds.data.plan.balance import check_world_size, rank_packs
from versatune_ds.data.plan.comparison import chosen_samples
from versatune_ds.data.plan.corpus import Corpus, Float64, PlannerSettings
from versatune_ds.data.plan.planner import StepPlan, plan_step
from versatune_ds.data.plan.state import PlannerState
from versatune_ds.foundations.errors import DataError, StateError


class _Prepared(NamedTuple):
    plan: StepPlan
    batches: list[Batch]
    plan_s: float


class _Prefetch(NamedTuple):
    weights: Float64
    unwanted: threading.Event
    result: Future[_Prepared]


class _Unwanted(Exception):
    """Ends a prefetch whose result nobody will take."""


@dataclass(eq=False)
class StepLoader:
    """Batches of one rank, step by step.

    Args:
        caches: token cache of each domain, in table order; None for a domain without data.
        state: where to start; `PlannerState.initial(k)` for a new run.
        rank, world_size: this rank among the data-parallel ranks; the plan does not depend on them.
        part: this rank among those that share a pack, and their number.
        compared_share: of the samples, to be compared with the base model.
        pads: fill every pack up to pack_len; else a batch has no more positions than its samples need.
        prefetch: prepare the next step in a thread. Without it the results are the same.
        pin_memory: put batches in page-locked memory, for copies that overlap (needs CUDA).

    Attributes:
        state: state after the last taken plan.
        last_plan: of the last taken step, if any.
        last_plan_s: seconds that planning the last taken step took, collating excluded.

    Raises:
        ConfigError: the ranks cannot share `packs_per_step` evenly.
    """

    corpus: Corpus
    caches: Sequence[TokenSource | None]
    settings: PlannerSettings
    state: PlannerState
    rank: int
    world_size: int
    _: KW_ONLY
    pad_id: int
    part: tuple[int, int] = (0, 1)
    compared_share: float = 0.0
    pads: bool = True
    prefetch: bool = True
    pin_memory: bool = False

    def __post_init__(self) -> None:
        check_world_size(self.settings.packs_per_step, self.world_size)
        self.last_plan: StepPlan | None = None
        self.last_plan_s = 0.0
        self._pool = ThreadPoolExecutor(1, "versatune-loader") if self.prefetch else None
        self._prefetch: _Prefetch | None = None
        self._closed = False

    def take(self, weights: Sequence[float] | Float64) -> tuple[StepPlan, list[Batch]]:
        """Plan of the next step and this rank's batches, one per micro-step, drawn from `weights`.

        Errors of the thread are raised here, when the step that they belong to is asked for; the state is
        then as before the call.

        Raises:
            StateError: the loader is closed, or see `plan_step`.
            ConfigError, DataError: see `plan_step` and `collate`.
        """
        if self._closed:
            raise StateError("the loader is closed: no more steps can be taken from it")
        wanted = np.array(weights, dtype=np.float64)
        prepared = self._prefetched(wanted)
        if prepared is None:
            prepared = self._prepare(wanted, self.state, threading.Event())
        self.state = prepared.plan.state_after
        self.last_plan, self.last_plan_s = prepared.plan, prepared.plan_s
        if self._pool is not None:
            unwanted = threading.Event()
            result = self._pool.submit(self._prepare, wanted, self.state, unwanted)
            self._prefetch = _Prefetch(wanted, unwanted, result)
        return prepared.plan, prepared.batches

    def _prefetched(self, weights: Float64) -> _Prepared | None:
        """The prefetched step if it was drawn from exactly `weights`; else it is dropped."""
        if self._prefetch is None:
            return None
        prefetch, self._prefetch = self._prefetch, None
        if np.array_equal(prefetch.weights, weights):
            return prefetch.result.result()
        prefetch.unwanted.set()
        prefetch.result.cancel()
        return None

    def _prepare(self, weights: Float64, state: PlannerState, unwanted: threading.Event) -> _Prepared:
        """Plan the step after `state` and collate this rank's packs; touches nothing of the loader."""
        start = time.perf_counter()
        plan = plan_step(self.corpus, self.settings, state, weights)
        plan_s = time.perf_counter() - start
        batches = []
        chosen = chosen_samples(plan.packs, self.compared_share, self.settings.seed, plan.step)
        everyone = list(zip(plan.packs, chosen, strict=True))
        num_compared = sum(self._supervised(pack.domains[of], pack.samples[of]) for pack, of in everyone)
        for pack, of_pack in rank_packs(everyone, self.rank, self.world_size):
            if unwanted.is_set():
                raise _Unwanted
            rows = rows_of(self.settings.pack_len if self.pads else pack.length, self.part[1])
            batch = collate(pack, self.caches, rows, self.pad_id)
            planned = self._supervised(pack.domains, pack.samples)
            if batch.supervised_tokens != planned:
                raise DataError(
                    f"step {plan.step}: a pack has {batch.supervised_tokens} supervised tokens and was "
                    f"planned with {planned}; the loss would be scaled wrongly. The token cache is damaged: "
                    "prepare it again"
                )
            if num_compared:
                normalizer = num_compared / self.world_size
                batch = compare(batch, pack, of_pack, self.caches, self.pad_id, normalizer)
            batch = batch.part(*self.part)
            batches.append(batch.pin_memory() if self.pin_memory else batch)
        return _Prepared(plan, batches, plan_s)

    def _supervised(self, domains: npt.NDArray[np.int32], samples: npt.NDArray[np.int64]) -> int:
        """Supervised tokens of samples, as planned with."""
        pairs = zip(domains, samples, strict=True)
        return sum(int(self.corpus.supervised[domain][sample]) for domain, sample in pairs)

    def close(self) -> None:
        """Drop the prefetched step and end the thread. May be called twice."""
        self._closed = True
        if self._prefetch is not None:
            self._prefetch.unwanted.set()
            self._prefetch = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
