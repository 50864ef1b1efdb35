"""What the runs of a study amount to: losses by domain, changes, paired differences, confidence intervals.

Losses are held-out nats per supervised token, l(d) of domain d. For a run from a base model with losses b(d):

    change(d)      l(d) / b(d) - 1: negative is better
    mean change    unweighted mean of change(d) over all domains: every domain counts the same
    objective      sum_d o(d) l(d) / sum_d o(d) b(d) - 1, for weights o that a user gave (`objectives`)
    against        either of them minus that of a baseline arm *with the same seed*
    gamma          (b(d) - lref(d)) / b(d), what the base model can learn by held-out losses
    forgetting     mean over the domains other than a target of max(change(d), 0)
    score          mean score of the model's own answers, where `evaluation.generate` asks for them

Intervals are 95 % t intervals of the mean over seeds; differences are taken seed by seed first. With five
seeds they say how much the order of samples matters, not how another corpus or model would behave.

What is not covered: training (`apps/study/run.py`), the tables (`tables`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import StateError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunResult:
    """One finished run. Mappings are by domain."""

    arm: str
    seed: int
    before: Mapping[str, float]
    """Held-out losses before the first step."""
    after: Mapping[str, float]
    """Held-out losses after the last step."""
    lowest: Mapping[str, float]
    """Lowest held-out losses of all evaluations after step 0."""
    token_shares: Mapping[str, float]
    """Share of all tokens that the run was trained on."""
    tokens: int
    """Tokens trained on, without padding."""
    updates: list[dict[str, Any]]
    """Lines of weights.jsonl, the initial one first."""
    scores_before: Mapping[str, float | None] = field(default_factory=dict)
    """Mean scores of the base model's answers, 0 to 1, of the domains that `evaluation.generate` asks."""
    scores_after: Mapping[str, float | None] = field(default_factory=dict)
    """The same after the last step."""


def read_result(folder: Path, arm: str, seed: int, total_steps: int) -> RunResult:
    """Read a finished run.

    Raises:
        StateError: a file is missing, or the run did not reach `total_steps`.
    """
    evaluations = _lines(folder / constants.EVAL_FILE)
    steps = [line["step"] for line in evaluations]
    if not steps or steps[0] != 0 or steps[-1] != total_steps:
        raise StateError(
            f"{folder}: evaluated after the steps {steps}; expected 0 .. {total_steps}. Remove the folder "
            "and start the command again"
        )
    metrics = _lines(folder / constants.METRICS_FILE)
    names = [name for name, loss in evaluations[0]["domain_loss"].items() if loss is not None]
    later = evaluations[1:]
    return RunResult(
        arm=arm,
        seed=seed,
        before=evaluations[0]["domain_loss"],
        after=evaluations[-1]["domain_loss"],
        lowest={name: min(line["domain_loss"][name] for line in later) for name in names},
        token_shares=metrics[-1]["cumulative_shares"]["tokens"],
        tokens=sum(line["real_tokens"] for line in metrics),
        updates=_lines(folder / constants.WEIGHTS_FILE),
        scores_before=evaluations[0].get("domain_score", {}),
        scores_after=evaluations[-1].get("domain_score", {}),
    )


def last_evaluation(folder: Path) -> tuple[int, float]:
    """Step of the last evaluation and its mean loss over evaluated domains; step -1 when there is none."""
    path = folder / constants.EVAL_FILE
    lines = _lines(path) if path.is_file() else []
    if not lines:
        return -1, math.nan
    losses = [loss for loss in lines[-1]["domain_loss"].values() if loss is not None]
    return int(lines[-1]["step"]), float(np.mean(losses))


def reference_losses(runs: Sequence[RunResult]) -> dict[str, float]:
    """Reference loss of every domain: the lowest held-out loss of the run on that domain alone."""
    return {run.arm: float(run.lowest[run.arm]) for run in runs}


def changes(run: RunResult, names: Sequence[str]) -> Array:
    """float64[k]: relative change of each domain's held-out loss from the base model."""
    before, after = (np.array([losses[name] for name in names]) for losses in (run.before, run.after))
    return after / before - 1.0


def objective_change(run: RunResult, objective: Mapping[str, float]) -> float:
    """Relative change of an objective, weights by domain of the held-out losses, from the base model."""
    before, after = (sum(o * at[name] for name, o in objective.items()) for at in (run.before, run.after))
    return after / before - 1.0


def interval(values: Sequence[float] | Array) -> dict[str, float | None]:
    """`mean` of independent values, one a seed, and `half_width` of its 95 % t interval (None for one)."""
    array = np.asarray(values, dtype=np.float64)
    n, half_width = len(array), None
    if n >= 2:
        half_width = float(stdtrit(n - 1, 0.975) * array.std(ddof=1) / math.sqrt(n))
    return {"mean": float(array.mean()), "half_width": half_width}


def intervals(values: Array, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """`interval` of each domain's column of float64[seeds, k]."""
    return {name: interval(column) for name, column in zip(names, values.T, strict=True)}


def by_arm(runs: Sequence[RunResult]) -> dict[str, dict[int, RunResult]]:
    """Runs by arm and seed, arms in order of appearance."""
    found: dict[str, dict[int, RunResult]] = {}
    for run in runs:
        found.setdefault(run.arm, {})[run.seed] = run
    return found


def arm_summary(
    runs: Mapping[int, RunResult],
    baselines: Mapping[str, Mapping[int, RunResult]],
    names: Sequence[str],
    objectives: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Numbers of one arm: all intervals are over its seeds, differences from `baselines` seed by seed."""
    seeds = sorted(runs)
    change = np.array([changes(runs[seed], names) for seed in seeds])
    loss = np.array([[runs[seed].after[name] for name in names] for seed in seeds])
    summary: dict[str, Any] = {
        "seeds": seeds,
        "mean_change": interval(change.mean(axis=1)),
        "domain_change": intervals(change, names),
        "domain_loss": intervals(loss, names),
        "token_shares": _mean_by_name([runs[seed].token_shares for seed in seeds], names),
        "tokens": interval([runs[seed].tokens for seed in seeds]),
        "weights": weight_summary([runs[seed] for seed in seeds], names),
        "domain_score": score_summary([runs[seed].scores_after for seed in seeds]),
        "objectives": {
            name: interval([objective_change(runs[seed], o) for seed in seeds])
            for name, o in objectives.items()
        },
        "against": {},
    }
    for name, baseline in baselines.items():
        shared = [seed for seed in seeds if seed in baseline]
        if not shared:
            continue
        apart = np.array([changes(runs[seed], names) - changes(baseline[seed], names) for seed in shared])
        summary["against"][name] = {
            "mean_change": interval(apart.mean(axis=1)),
            "domain_change": intervals(apart, names),
            "objectives": {
                key: interval(
                    [objective_change(runs[s], o) - objective_change(baseline[s], o) for s in shared]
                )
                for key, o in objectives.items()
            },
        }
    return summary


def expansion_summary(runs: Mapping[int, RunResult], target: str, names: Sequence[str]) -> dict[str, Any]:
    """Gain in the target and loss in the other domains, with intervals over seeds."""
    seeds = sorted(runs)
    change = np.array([changes(runs[seed], names) for seed in seeds])
    j = list(names).index(target)
    others = np.delete(change, j, axis=1)
    return {
        "target_share": _mean_by_name([runs[seed].token_shares for seed in seeds], names)[target],
        "target_change": interval(change[:, j]),
        "others_change": interval(others.mean(axis=1)),
        "forgetting": interval(np.maximum(others, 0.0).mean(axis=1)),
        "worst_other": interval(others.max(axis=1)),
        "domain_change": intervals(change, names),
    }


def score_summary(scores: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Scores of answers by domain, with intervals over the runs that have one."""
    by_name = {name: [of[name] for of in scores if of.get(name) is not None] for name in scores[0]}
    return {name: interval(np.array(found, dtype=np.float64)) for name, found in by_name.items() if found}


def weight_summary(runs: Sequence[RunResult], names: Sequence[str]) -> dict[str, Any]:
    """First and last weights by domain, means over the runs, how far they moved, and the share of open gates.

    `moved` is the total variation distance (half the sum of absolute differences) between the two.
    """
    ends = np.array(
        [
            [[line["after"][name] for name in names] for line in (run.updates[0], run.updates[-1])]
            for run in runs
        ]
    )  # [runs, first and last, k]
    first, last = ends[:, 0], ends[:, 1]
    gates = [line["gate_open"] for run in runs for line in run.updates if line["gate_open"] is not None]
    return {
        "initial": dict(zip(names, first.mean(axis=0).tolist(), strict=True)),
        "final": dict(zip(names, last.mean(axis=0).tolist(), strict=True)),
        "moved": float(0.5 * np.abs(last - first).sum(axis=1).mean()),
        "gate_open": None if not gates else float(np.mean(gates)),
    }


def summarise(
    *,
    reference: Mapping[str, float],
    arms: Sequence[RunResult],
    names: Sequence[str],
    baselines: Sequence[str],
    expansions: Sequence[tuple[str, Sequence[str]]],
    objectives: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """All numbers of a study as plain JSON; `expansions` are targets with the names of their arms."""
    found = by_arm(arms)
    against = {name: found[name] for name in baselines}
    first = next(iter(against[baselines[0]].values()))
    before = dict(first.before)
    return {
        "domains": list(names),
        "baselines": list(baselines),
        "base_loss": before,
        "base_score": dict(first.scores_before),
        "reference": dict(reference),
        "gamma": {name: (before[name] - reference[name]) / before[name] for name in names},
        "arms": {arm: arm_summary(runs, against, names, objectives) for arm, runs in found.items()},
        "expansions": {
            target: {arm: expansion_summary(found[arm], target, names) for arm in members}
            for target, members in expansions
        },
    }


def _mean_by_name(values: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: float(np.mean([value[name] for value in values])) for name in names}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise StateError(f"{path} is missing; remove {path.parent} and start the command again")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
