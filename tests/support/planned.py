"""Random corpora and weights, and runs of planned steps."""

from __future__ import annotations

import numpy as np

from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.data.plan.planner import StepPlan, plan_step
from versatune_ds.data.plan.state import PlannerState


def random_corpus(seed: int, sizes: list[int], longest: int) -> Corpus:
    """A corpus of uniform lengths 1..longest; about half of each sample is supervised."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, longest + 1, size).astype(np.int32) for size in sizes]
    return Corpus(lengths, [(n + 1) // 2 for n in lengths], tuple(f"d{i}" for i in range(len(sizes))))


def random_weights(seed: int, num_domains: int, num_steps: int) -> list[np.ndarray]:
    """A weight vector per step; changes at some steps, some weights are 0."""
    rng = np.random.default_rng(seed)
    weights = []
    current = np.full(num_domains, 1 / num_domains)
    for _ in range(num_steps):
        if rng.random() < 0.5:
            current = rng.dirichlet(np.ones(num_domains))
            current[rng.random(num_domains) < 0.2] = 0
            current = current / current.sum() if current.any() else np.full(num_domains, 1 / num_domains)
        weights.append(current)
    return weights


def run(
    corpus: Corpus, settings: PlannerSettings, weights: list[np.ndarray], state: PlannerState | None = None
) -> list[StepPlan]:
    """Plan a step for each entry of `weights`."""
    state = state or PlannerState.initial(len(corpus.lengths))
    plans = []
    for step_weights in weights:
        plans.append(plan_step(corpus, settings, state, step_weights))
        state = plans[-1].state_after
    return plans


def content(plan: StepPlan) -> list[list[tuple[int, int]]]:
    """(domain, sample) of every pack."""
    return [list(zip(p.domains.tolist(), p.samples.tolist(), strict=True)) for p in plan.packs]
