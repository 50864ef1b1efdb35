"""The strategies that move domain weights: a rule each, pure and float64, and the table `STRATEGIES`.

Symbols, by domain j: w weight, l loss now and lref held-out reference loss (nats per supervised token),
gamma learnable potential, phi forgetting degree. Z makes the weights sum to 1.

Source of gamma, phi and the two-phase scheme: VersaTune (Lu et al., arXiv 2411.11266). The exact text of its
Algorithms 2 and 3 and its values of sigma, delta and epsilon are not public to us: `fostering` (two forms)
and `expansion` (three gates) are our readings of it, each with a name, and not the paper's text.

A domain whose loss was never measured keeps its weight; a rule re-weights the measured ones among
themselves. A rule that only multiplies cannot revive a domain of weight 0: use `min_weight` for that.

A rule takes `UpdateInputs` and, by keyword, the settings of `weights.*` that it reads; what no other strategy
reads has no effect with another one, and a run says so. A new strategy is its rule and an entry of the table
here, a row of the table in tests/strategies/test_rules.py and a file in configs/strategies; a setting that
only it has is a field of `Weights` in config/weights.py.

What is not covered: floor, cap and step limit (`simplex`), windows and absent domains (`domain.controller`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.strategies.simplex import NEGLIGIBLE, Vector, normalise

Mask = npt.NDArray[np.bool_]

MIN_LOSS = 1e-9
"""Smallest divisor of a relative loss change, in nats; a loss of exactly 0 must not divide."""


@dataclass(frozen=True, eq=False, kw_only=True)
class UpdateInputs:
    """What an update may depend on; the same on every rank. All vectors have length k and are finite.

    Raises:
        ValueError: a vector is not finite, or lengths differ.
    """

    weights: Vector
    """float64[k]: weights in force, on the simplex."""
    losses: Vector
    """float64[k]: l in nats per supervised token; 0 where never measured."""
    measured: Mask
    """bool[k]: whether l has ever been measured."""
    reference: Vector
    """float64[k]: lref in nats per supervised token; 0 for rules that use none."""
    gamma: Vector
    """float64[k]: learnable potential, 0 .. 1."""
    phi: Vector
    """float64[k]: forgetting degree, >= 0."""
    target: int | None = None
    """Id of the domain to grow (expansion)."""
    scheduled: Vector | None = None
    """float64[k]: weights that the schedule gives for this step (manual)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, np.ndarray):
                continue
            if value.shape != self.weights.shape or value.ndim != 1:
                raise ValueError(f"{field.name} has shape {value.shape}, weights {self.weights.shape}")
            if not np.isfinite(value).all():
                raise ValueError(f"{field.name} is not finite: {value.tolist()}")


@dataclass(frozen=True)
class GateDecision:
    """Whether the target of an expansion may grow, and the two numbers compared."""

    is_open: bool
    forgetting: float
    """Mean or largest phi over the domains other than the target."""
    limit: float
    """What it may not exceed."""
    statistic: str
    """`mean` or `largest`."""

    @property
    def reason(self) -> str:
        """The decision in words."""
        verb, sign = ("open", "<=") if self.is_open else ("closed", ">")
        numbers = f"{self.forgetting:.6g} {sign} {self.limit:.6g}"
        return f"gate {verb}: {self.statistic} phi of the others {numbers}"


def learnable_potential(
    losses: Vector,
    reference: Vector,
    *,
    stderr: Vector | None = None,
    reference_stderr: Vector | None = None,
    noise_z: float = 0.0,
) -> Vector:
    """gamma_j = max((l_j - lref_j - z se_j) / l_j, 0), float64[k]; VersaTune, with z = 0.

    se_j = sqrt(stderr_j^2 + reference_stderr_j^2) is the standard error of the difference (ours).
    """
    margin = noise_z * _stderr_of_difference(losses, stderr, reference_stderr)
    return np.maximum((losses - reference - margin) / np.maximum(losses, MIN_LOSS), 0.0)


def forgetting_degree(
    losses: Vector,
    previous: Vector,
    *,
    stderr: Vector | None = None,
    previous_stderr: Vector | None = None,
    noise_z: float = 0.0,
) -> Vector:
    """phi_j(t) = max((l_j(t) - l_j(t-1) - z se_j) / l_j(t-1), 0), float64[k]; VersaTune, with z = 0.

    phi is one-sided, so noise alone makes it positive; z standard errors of the difference are taken off
    first (ours). se_j = sqrt(stderr_j(t)^2 + stderr_j(t-1)^2).
    """
    margin = noise_z * _stderr_of_difference(losses, stderr, previous_stderr)
    return np.maximum((losses - previous - margin) / np.maximum(previous, MIN_LOSS), 0.0)


def uniform_weights(prior: Vector) -> Vector:
    """w_j = 1 / k."""
    return np.full(prior.shape, 1.0 / len(prior))


def inverse_weights(prior: Vector) -> Vector:
    """w_j = (1 - p_j) / Z, the baseline "inverse" of VersaTune; a single domain keeps weight 1."""
    return normalise(1.0 - prior) if len(prior) > 1 else np.ones(1)


def constant_weights(prior: Vector) -> Vector:
    """w_j = p_j: the detected distribution."""
    return prior.copy()


def keep(inputs: UpdateInputs) -> Vector:
    """w <- w: a static strategy set its weights before the first step."""
    return inputs.weights.copy()


def manual(inputs: UpdateInputs) -> Vector:
    """w <- the weights that the schedule gives for this step."""
    if inputs.scheduled is None:
        raise ValueError("manual needs the scheduled weights of this step")
    return inputs.scheduled.copy()


def fostering(inputs: UpdateInputs, *, form: str, sigma: float) -> Vector:
    """Multi-ability fostering: domains with much left to learn grow.

    linear: w_j <- w_j (1 + sigma gamma_j) / Z; exponential: w_j <- w_j exp(sigma gamma_j) / Z.
    Two readings of VersaTune's Algorithm 2, whose text is not public to us.
    """
    return _foster(inputs, inputs.measured, form, sigma)


def expansion(
    inputs: UpdateInputs, *, form: str, sigma: float, delta: float, gate: str, epsilon: float
) -> Vector:
    """Flexible domain expansion: a target e grows while the other domains are not forgotten.

    Gate open: w_e <- w_e + delta (at most 1), w_j <- w_j (1 - w_e_new) / (1 - w_e_old) for j != e.
    Gate closed: w_e stays; the others are re-weighted among themselves by the fostering rule.
    Our reading of VersaTune's Algorithm 3, whose text is not public to us; for the gate see
    `expansion_gate`.
    """
    target = _target(inputs)
    others = np.arange(len(inputs.weights)) != target
    if not expansion_gate(inputs, gate=gate, epsilon=epsilon).is_open:
        return _foster(inputs, inputs.measured & others, form, sigma)
    weights = inputs.weights.copy()
    rest = 1.0 - weights[target]
    if rest <= 0:
        return weights
    grown = min(weights[target] + delta, 1.0)
    weights[others] *= (1.0 - grown) / rest
    weights[target] = grown
    return normalise(weights)


def expansion_gate(inputs: UpdateInputs, *, gate: str, epsilon: float) -> GateDecision:
    """Compare the forgetting of the domains j != e with a limit; equal is open.

    relative: mean phi_j <= epsilon gamma_e; absolute: mean phi_j <= epsilon; worst: max phi_j <= epsilon
    gamma_e. Three readings of VersaTune's condition. Absent domains count with phi = 0.
    """
    target = _target(inputs)
    others = np.delete(inputs.phi, target)
    statistic = "largest" if gate == "worst" else "mean"
    if not len(others):
        return GateDecision(is_open=True, forgetting=0.0, limit=0.0, statistic=statistic)
    forgetting = float(others.max()) if gate == "worst" else math.fsum(others) / len(others)
    limit = epsilon * (1.0 if gate == "absolute" else float(inputs.gamma[target]))
    return GateDecision(is_open=forgetting <= limit, forgetting=forgetting, limit=limit, statistic=statistic)


def doremi(inputs: UpdateInputs, *, eta: float, smoothing: float) -> Vector:
    """a_j <- w_j exp(eta max(l_j - lref_j, 0)) / Z; w_j <- (1 - c) a_j + c / k.

    DoReMi (Xie et al., arXiv 2305.10429, Algorithm 1), with c = `smoothing`. The original clips the excess
    loss of each token at 0; we have one reference number a domain and clip the excess of the mean.
    """
    excess = np.maximum(inputs.losses - inputs.reference, 0.0)
    raised = _reweight_exp(inputs.weights, eta * excess, inputs.measured)
    return normalise((1.0 - smoothing) * raised + smoothing / len(raised))


def raw_loss(inputs: UpdateInputs) -> Vector:
    """w_j <- w_j exp(l_j) / Z: what the published reference code of VersaTune runs; here to compare."""
    return _reweight_exp(inputs.weights, inputs.losses, inputs.measured)


NEEDED = {
    "reference": "compares with reference losses: give `reference` (held-out nats per supervised token for "
    "every domain)",
    "target": "grows one domain: name it in `target`",
    "schedule": "follows `schedule`: give a list or a weights.jsonl",
}
"""What a strategy may require -> what it is for and how to give it."""


@dataclass(frozen=True)
class Strategy:
    """How the weights of a run begin and how they move."""

    rule: Callable[..., Vector] = keep
    """`UpdateInputs`, and by keyword the settings of its own -> float64[k] on the simplex."""
    start: Callable[[Vector], Vector] = constant_weights
    """Prior p (`domains.initial`, float64[k] on the simplex) -> weights before the first step."""
    requires: tuple[str, ...] = ()
    """Settings of `NEEDED` that it cannot be without. With a schedule its rule is called at the scheduled
    steps, with or without losses, and its weights are taken as they are."""
    gate: Callable[..., GateDecision] | None = None
    """Whether the target may grow, to be recorded; it is called as `rule` is."""
    revives_by: str | None = None
    """Setting of its own that, above 0, gives a weight to every domain, also to one that has none."""

    @property
    def compares(self) -> bool:
        """Whether losses are compared with reference losses."""
        return "reference" in self.requires

    @property
    def is_scheduled(self) -> bool:
        """Whether its weights are known before the first step, and no losses move them."""
        return "schedule" in self.requires

    @property
    def moves_with_losses(self) -> bool:
        """Whether losses move the weights."""
        return self.rule is not keep and not self.is_scheduled

    @property
    def own_settings(self) -> set[str]:
        """Settings of `weights.*` that have an effect only with strategies that name them."""
        return _keywords(self.rule) | (set(self.requires) - {"reference"})

    def propose(self, inputs: UpdateInputs, settings: object) -> Vector:
        """float64[k] on the simplex: what the rule makes of the inputs; `settings` are `Weights`."""
        return _call(self.rule, inputs, settings)

    def decide(self, inputs: UpdateInputs, settings: object) -> GateDecision | None:
        """The decision of the gate, if the strategy has one."""
        return None if self.gate is None else _call(self.gate, inputs, settings)


STRATEGIES: dict[str, Strategy] = {
    "uniform": Strategy(start=uniform_weights),
    "inverse": Strategy(start=inverse_weights),
    "constant": Strategy(),
    "manual": Strategy(manual, requires=("schedule",)),
    "fostering": Strategy(fostering, requires=("reference",)),
    "expansion": Strategy(expansion, requires=("reference", "target"), gate=expansion_gate),
    "doremi": Strategy(doremi, requires=("reference",), revives_by="smoothing"),
    "raw_loss": Strategy(raw_loss),
}
"""`weights.strategy` -> what it does. `constant` is "knowledge-consistent" in VersaTune: p, never moved."""


def settings_of_others(strategy: str) -> set[str]:
    """Settings of `weights.*` that other strategies have for themselves: without effect with this one."""
    known = set().union(*(other.own_settings for other in STRATEGIES.values()))
    return known - STRATEGIES[strategy].own_settings


def _keywords(function: Callable[..., Any]) -> set[str]:
    return set(inspect.getfullargspec(function).kwonlyargs)


def _call(function: Callable[..., Any], inputs: UpdateInputs, settings: object) -> Any:
    return function(inputs, **{name: getattr(settings, name) for name in _keywords(function)})


def _target(inputs: UpdateInputs) -> int:
    if inputs.target is None:
        raise ValueError("expansion needs the id of its target")
    return inputs.target


def _foster(inputs: UpdateInputs, movable: Mask, form: str, sigma: float) -> Vector:
    strength = sigma * inputs.gamma
    if form == "exponential":
        return _reweight_exp(inputs.weights, strength, movable)
    return _reweight(inputs.weights, 1.0 + strength, movable)


def _reweight_exp(weights: Vector, exponents: Vector, movable: Mask) -> Vector:
    """`_reweight` by exp(exponents), shifted by the largest one so that nothing overflows."""
    active = movable & (weights > NEGLIGIBLE)
    if not active.any():
        return weights.copy()
    factors = np.zeros_like(weights)
    # math.exp: numpy picks its exp by the processor's vector units, and ranks must agree in every bit
    factors[active] = [math.exp(x) for x in exponents[active] - exponents[active].max()]
    return _reweight(weights, factors, movable)


def _reweight(weights: Vector, factors: Vector, movable: Mask) -> Vector:
    """Multiply the movable weights by `factors` and rescale them to the total they had; others stay."""
    active = movable & (weights > NEGLIGIBLE)
    result = weights.copy()
    if not active.any():
        return result
    raised = weights[active] * factors[active]
    mass = math.fsum(weights[active])
    result[active] = raised * (mass / math.fsum(raised))
    return normalise(result)


def _stderr_of_difference(like: Vector, first: Vector | None, second: Vector | None) -> Vector:
    square = np.zeros_like(like)
    for stderr in (first, second):
        if stderr is not None:
            square = square + stderr * stderr
    return np.sqrt(square)
