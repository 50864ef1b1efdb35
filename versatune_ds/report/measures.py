"""Numbers that a report states, computed from a run's arrays, and how they are written.

Losses of several steps or domains are always sums over tokens divided once, shares of several steps are
weighted by the steps' sizes, and NaN (not recorded) never spreads: a dash stands for it.

What is not covered: reading (`runs`), tables and sections (`report`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from versatune_ds.foundations.errors import StateError
from versatune_ds.report.runs import Array, RunData, smooth

NOTHING = "\u2013"
MINUS = "\u2212"
MAX_POINTS = 400
"""A line is averaged down to this many points: a picture has fewer pixels than a run may have steps."""


def number(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.{digits}f}".replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percent; a dash for None and NaN."""
    text = number(None if value is None else 100 * value, digits)
    return text if text == NOTHING else f"{text} %"


def first_last(values: Array) -> tuple[float, float]:
    """First and last number of [n] values, leaving out NaN; NaN where there is none."""
    found = values[np.isfinite(values)]
    return (float(found[0]), float(found[-1])) if len(found) else (math.nan, math.nan)


def arrow(first: float, last: float, form: Callable[[float], str] = number) -> str:
    """`first → last`, one number where they are the same text, a dash where there is none."""
    texts = form(first), form(last)
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} → {texts[1]}"


def change(first: float, last: float) -> str:
    """Relative change in percent with a sign."""
    if not (math.isfinite(first) and math.isfinite(last)) or first == 0:
        return NOTHING
    value = 100 * (last / first - 1)
    return f"{value:+.1f} %".replace("-", MINUS)


def median(values: Array) -> float:
    """Median without NaN; NaN where nothing is left."""
    found = values[np.isfinite(values)]
    return float(np.median(found)) if len(found) else math.nan


def mean(values: Array) -> float:
    """Mean without NaN; NaN where nothing was recorded."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def total(values: Array) -> float:
    """Sum without NaN; NaN where nothing was recorded."""
    return float(np.nansum(values)) if np.isfinite(values).any() else math.nan


def window_of(run: RunData) -> int:
    """Steps that a smoothed loss averages over: a twentieth of the run, 5 to 50, but not more than it has."""
    steps = len(run.steps)
    return max(1, min(steps, 50, max(5, steps // 20)))


def train_loss(run: RunData, column: int | None = None) -> tuple[float, float]:
    """Training loss over the first and the last `window_of` steps, of a domain or (None) of all."""
    return first_last(smoothed_loss(run, column)[window_of(run) - 1 :])


def smoothed_loss(run: RunData, column: int | None) -> Array:
    """[n] loss over the tokens of the last `window_of` steps, of a domain or (None) of all."""
    if column is None:
        return smooth(run.series["loss"], window_of(run), run.series["supervised_tokens"])
    tokens = run.domain_series["domain_supervised_tokens"][:, column]
    loss = run.domain_series["domain_loss"][:, column]
    return smooth(loss, window_of(run), tokens if np.isfinite(tokens).any() else None)


def trained_shares(run: RunData, unit: str) -> Array:
    """[k] share of each domain in everything trained on, in `unit`; NaN where not recorded."""
    return last_row(cumulative_shares(run, run.shares[unit], unit))


def target_by_step(run: RunData) -> Array:
    """[n, k] target shares; the weights where a run does not record targets."""
    targets = run.domain_series["target_shares"]
    return targets if np.isfinite(targets).any() else run.domain_series["weights"]


def cumulative_shares(run: RunData, shares: Array, unit: str) -> Array:
    """[n, k] mean share from the first step up to each step, steps counted by their size in `unit`."""
    size_key = {"samples": "samples", "tokens": "real_tokens"}.get(unit, unit)
    size = run.series[size_key]
    size = np.nan_to_num(size) if np.isfinite(size).any() else np.ones_like(size)
    size = np.where(np.isfinite(shares).all(axis=1), size, 0.0)[:, None]
    amount = np.cumsum(np.nan_to_num(shares) * size, axis=0)
    whole = np.broadcast_to(np.cumsum(size, axis=0), amount.shape)
    shares_so_far = np.full(amount.shape, np.nan)
    np.divide(amount, whole, out=shares_so_far, where=whole > 0)
    return shares_so_far


def share_gap(run: RunData) -> Array:
    """[n, k] achieved minus target share from the first step up to each step, in the weight unit."""
    unit = run.weight_unit
    return cumulative_shares(run, run.shares[unit], unit) - cumulative_shares(run, target_by_step(run), unit)


def last_row(values: Array) -> Array:
    """[k] the last row of [n, k]; NaN when there is none."""
    return values[-1] if len(values) else np.full(values.shape[1], np.nan)


def total_steps(run: RunData) -> int | None:
    """Planned optimizer steps, from run.json."""
    value = run.info.get("total_steps")
    return value if isinstance(value, int) and value > 0 else None


def status(run: RunData) -> str:
    """How far the run is, in words."""
    done = int(run.steps[-1]) if len(run.steps) else 0
    planned = total_steps(run)
    if planned is None:
        return f"{done:,} steps"
    if done >= planned:
        return f"{done:,} steps, complete"
    return f"{done:,} of {planned:,} steps: running or stopped"


def all_names(runs: Sequence[RunData]) -> list[str]:
    """Domains of all runs, in the order of the first run that has them."""
    return list(dict.fromkeys(name for run in runs for name in run.names))


def x_range(runs: Sequence[RunData]) -> tuple[float, float]:
    """Steps that all pictures show."""
    steps_of = [steps for run in runs for steps in (run.steps, run.eval_steps, run.weight_steps)]
    last = [float(steps[-1]) for steps in steps_of if len(steps)]
    return (0.0, max(last, default=1.0) or 1.0)


def by_tokens(run: RunData) -> RunData:
    """The same run with tokens trained on so far in place of steps, to line up runs with unequal steps.

    Raises:
        StateError: it does not record tokens.
    """
    tokens = run.series["real_tokens"]
    if len(tokens) and not np.isfinite(tokens).any():
        raise StateError(f"{run.folder} records no real_tokens; leave out --by tokens")
    x, y = np.append(0.0, run.steps), np.append(0.0, np.cumsum(np.nan_to_num(tokens)))
    names = ("steps", "weight_steps", "update_steps", "eval_steps")
    moved = {name: np.interp(getattr(run, name), x, y) for name in names}
    return dataclasses.replace(run, x_label="tokens trained on", **moved)


def thin(x: Array, y: Array, max_points: int = MAX_POINTS) -> tuple[Array, Array]:
    """Average neighbours so that at most `max_points` are left; NaN entries are left out of a mean."""
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(x)))
    valid = np.isfinite(y)
    count = np.add.reduceat(valid.astype(float), edges)
    means = np.full(len(edges), np.nan)
    np.divide(np.add.reduceat(np.where(valid, y, 0.0), edges), count, out=means, where=count > 0)
    return np.add.reduceat(x, edges) / sizes, means


def thin_steps(x: Array, y: Array) -> tuple[Array, Array]:
    """Leave out points that a step line does not need: those between two equal neighbours."""
    if len(x) < 3:
        return x, y
    same = np.nan_to_num(y, nan=-1.0)
    keep = np.ones(len(x), dtype=bool)
    keep[1:-1] = (same[1:-1] != same[:-2]) | (same[1:-1] != same[2:])
    return x[keep], y[keep]
