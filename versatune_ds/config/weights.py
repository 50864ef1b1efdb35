"""Settings of the domains and of how their weights move.

What is not covered: the other sections, and whether every domain is named (`config/schema.py`); the rules
themselves (`strategies/rules.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from versatune_ds.config.section import Place, Section
from versatune_ds.strategies.rules import NEEDED, STRATEGIES

WeightUnit = Literal["samples", "tokens", "supervised_tokens"]
if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[tuple(STRATEGIES)]
WEIGHT_SUM_TOLERANCE = 1e-3
"""How far given shares may be from summing to 1 (rounded decimals); they are then scaled to sum to 1."""
LONGEST_INTERVAL, UPDATES = 100, 20
"""Without `weights.every_n_steps`: the most steps between updates, and how many a short run has."""


def share_problems(values: dict[str, float], what: str) -> Iterator[str]:
    """Why `values` are no shares: each >= 0, together 1 (within the tolerance)."""
    for name, value in values.items():
        if value < 0:
            yield f"{what}: {name} has the negative share {value}"
    total = sum(values.values())
    if abs(total - 1.0) > WEIGHT_SUM_TOLERANCE:
        yield f"{what}: shares sum to {total:.6g}; they must sum to 1"


class Domains(Section):
    """The domains and the limits of their weights. A weight is a share of each global batch."""

    names: list[str] = Field(min_length=1)
    """Domain names; their order is the order of all tables."""
    initial: Literal["uniform"] | dict[str, float] | Place = "uniform"
    """Weights to start from: detected shares (sum 1), or the knowledge.json of `versatune-ds detect`."""
    weight_unit: WeightUnit = "samples"
    """What a weight is a share of: samples (as in the paper), tokens, or supervised tokens."""
    min_weight: float = Field(0.0, ge=0, le=1)
    """Floor of every weight, from the first batch on."""
    max_weight: float = Field(1.0, gt=0, le=1)
    """Cap of every weight, from the first batch on."""
    max_relative_change: float | None = Field(None, gt=0)
    """Largest relative change of a weight in one update; 0.5 keeps it within x0.5 .. x1.5. None: no limit."""
    max_epochs: dict[str, float] | float | None = None
    """Largest number of passes over a domain's data (one number, or one per domain); its surplus share is
    spread over the other domains."""

    def problems(self) -> Iterator[str]:
        k = len(self.names)
        if self.min_weight * k > 1:
            yield f"min_weight {self.min_weight} x {k} domains is more than 1"
        if self.max_weight * k < 1:
            yield f"max_weight {self.max_weight} x {k} domains is less than 1"
        if isinstance(self.initial, dict):
            yield from share_problems(self.initial, "domains.initial")


class ScheduledWeights(Section):
    """One entry of a manual schedule."""

    step: int = Field(ge=0)
    """Optimizer steps done when these weights begin to hold."""
    weights: dict[str, float]
    """Share of every domain; they sum to 1."""

    def problems(self) -> Iterator[str]:
        yield from share_problems(self.weights, f"schedule at step {self.step}")


class Guard(Section):
    """Overfitted domains lose their share: `domain/probes/guard.py`. It probes at every weight update."""

    probes: int = Field(3, ge=1)
    """Probes in a row at which a domain must be overfitted before it is held: since the best one its held-out
    loss has risen and its training loss has fallen."""
    noise_z: float = Field(2.0, ge=0)
    """Standard errors that both must exceed."""
    go_back: bool = False
    """When a domain is held, parameters and optimizer go back to the checkpoint of its best probe, and it
    stays held. The checkpoint of every domain's best probe is kept."""


class Weights(Section):
    """How domain weights move. Symbols as in docs/weights.md: l loss, lref reference loss, gamma, phi."""

    strategy: StrategyName = "constant"
    """`constant` keeps `domains.initial`; `uniform` and `inverse` ((1 - p) / Z) are static too; `manual`
    follows `schedule`; `fostering`, `expansion`, `doremi` and `raw_loss` move with the losses."""
    every_n_steps: int | None = Field(None, ge=1)
    """Optimizer steps between updates, and the length of the loss window. None: a twentieth of the run, so
    that shares arrive before the learning rate is gone, and at most 100; 100 where weights do not move."""
    form: Literal["linear", "exponential"] = "linear"
    """fostering: w (1 + sigma gamma) / Z, or w exp(sigma gamma) / Z."""
    sigma: float = Field(1.0, ge=0)
    """fostering: strength of the learnable potential gamma."""
    target: str | None = None
    """expansion: the domain to grow."""
    delta: float = Field(0.05, ge=0, le=1)
    """expansion: growth of the target's weight per update while the gate is open."""
    gate: Literal["relative", "absolute", "worst"] = "relative"
    """expansion: open while mean phi <= epsilon gamma_e (relative), mean phi <= epsilon (absolute), or
    max phi <= epsilon gamma_e (worst), over the domains other than the target e."""
    epsilon: float = Field(1.0, ge=0)
    """expansion: tolerance of the gate."""
    eta: float = Field(1.0, ge=0)
    """doremi: step size of the exponentiated gradient."""
    objective: dict[str, float] | None = None
    """`versatune-ds search`: weight of every domain's held-out loss in what is to be lowered; None: all
    alike."""
    smoothing: float = Field(1e-3, ge=0, le=1)
    """doremi: share of the uniform distribution mixed in after each update."""
    schedule: list[ScheduledWeights] | Place | None = None
    """manual: weights by step, or the weights.jsonl of a run to replay."""
    reference: dict[str, float] | Place | None = None
    """Held-out reference loss lref per domain (nats per supervised token), or a reference.json."""
    loss_unit: Literal["token", "byte"] = "token"
    """Unit in which losses meet their reference. `token`: a reference of another tokenizer is refused.
    `byte`: both sides are compared in bits per byte of supervised text; the tokenizers may differ."""
    loss_source: Literal["train", "probe"] = "train"
    """`train`: losses of the training steps of the window, free. `probe`: held-out losses, forward only."""
    probe_samples: int = Field(64, ge=1)
    """probe and guard: held-out samples per domain."""
    noise_z: float = Field(0.0, ge=0)
    """Standard errors subtracted from a loss difference before it counts as gamma or phi; 0 is the paper."""
    update_z: float = Field(0.0, ge=0)
    """An update is applied only if it is longer than this many of its standard errors, else the window goes
    on until the next one; 0: always. Try 1."""
    min_tokens: int = Field(1, ge=1)
    """A domain with fewer supervised tokens in the window keeps its previous loss and gamma; phi is 0."""
    guard: Guard | None = None
    """Take the share of a domain that is overfitted, with any strategy; None: no guard."""
    shadow: bool = False
    """Compute and log updates without applying them."""

    def interval(self, total_steps: int | None = None) -> int:
        """Optimizer steps between updates of a run of `total_steps`, if that is known.

        Where nothing moves the weights, all are alike: the longest.
        """
        moves = self.guard is not None or STRATEGIES[self.strategy].moves_with_losses
        longest = min(LONGEST_INTERVAL, total_steps // UPDATES) if moves and total_steps else LONGEST_INTERVAL
        return self.every_n_steps or max(1, longest)

    @property
    def needs_probe(self) -> bool:
        """Whether held-out losses are measured at every update."""
        return self.loss_source == "probe" or self.guard is not None

    def problems(self) -> Iterator[str]:
        strategy = STRATEGIES[self.strategy]
        lacking = [name for name in strategy.requires if not getattr(self, name)]
        yield from (f"strategy {self.strategy} {NEEDED[name]}" for name in lacking)
        if self.shadow and self.guard is not None and self.guard.go_back:
            yield "guard.go_back has no effect with shadow, which only tells: remove one of them"
        if self.update_z > 0 and not strategy.moves_with_losses:
            yield f"update_z has no effect: no losses move {self.strategy}'s weights"
        if self.objective is not None:
            yield from share_problems(self.objective, "objective")
        if isinstance(self.schedule, list):
            steps = [entry.step for entry in self.schedule]
            if steps != sorted(set(steps)):
                yield f"schedule steps must rise: {steps}"
        if isinstance(self.reference, dict) and self.loss_unit == "byte":
            yield (
                "loss_unit byte needs the bytes per token of the reference's own tokenizer: give a "
                "reference.json of `versatune-ds reference`, or loss_unit: token"
            )
        if isinstance(self.reference, dict):
            bad = [name for name, value in self.reference.items() if value <= 0]
            if bad:
                yield f"reference loss of {bad[0]} is {self.reference[bad[0]]}: must be > 0"
