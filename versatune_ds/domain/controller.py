"""The controller of domain weights: window of losses in, weights and a full record out.

Every rank holds one and feeds it the same reduced sums. It uses no clock and no randomness, so all ranks
compute the same bits; `digest` lets them check that. Order of calls in a run:

    controller = WeightController(table, config.domains, config.weights, reference)
    first line of weights.jsonl: controller.initial_update().to_json()
    after each optimizer step:   controller.observe(sums of the step)
    if controller.due(step, skipped=...): record = controller.update(step)   # step: optimizer steps done
    next batch (step index s):   drawn with controller.weights

What is not covered: reducing sums over ranks, running the probe, writing weights.jsonl (engine).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.config.weights import Domains, Weights
from versatune_ds.domain.alarms import reference_alarms, weight_alarms
from versatune_ds.domain.probes.gains import MarginalGains
from versatune_ds.domain.probes.guard import OverfitGuard
from versatune_ds.domain.probes.samples import SampleLosses
from versatune_ds.domain.reference import ReferenceLosses, initial_weights
from versatune_ds.domain.replay import require_limits, resolve_schedule
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.domain.weight_update import (
    ByNameOrNone,
    Measurement,
    Proposal,
    WeightUpdate,
    limit_reasons,
    loaded_optional,
    loaded_weights,
    measurement_reasons,
    optional,
)
from versatune_ds.foundations.errors import ConfigError, StateError
from versatune_ds.strategies.noise import refusal, update_stderr
from versatune_ds.strategies.rules import (
    STRATEGIES,
    GateDecision,
    Mask,
    UpdateInputs,
    forgetting_degree,
    learnable_potential,
)
from versatune_ds.strategies.simplex import Vector, entropy, limit_weights, weights_digest

STATE_VERSION = 1


class WeightController:
    """Holds the weights, the loss window and the last losses of a run.

    Args:
        reference: held-out losses (`load_reference`), needed by strategies that compare with them.
        total_steps: optimizer steps of the run, where they are known: `interval` may depend on them.

    Attributes:
        interval: optimizer steps between updates.

    Raises:
        ConfigError: no reference where one is needed; limits that no weights can keep; a schedule that
            breaks floor or cap.
        DataError: a file of initial weights or a schedule cannot be read.
    """

    def __init__(
        self,
        table: DomainTable,
        domains: Domains,
        weights: Weights,
        reference: ReferenceLosses | None = None,
        total_steps: int | None = None,
    ) -> None:
        self._strategy = STRATEGIES[weights.strategy]
        if self._strategy.compares and reference is None:
            raise ConfigError(f"strategy {weights.strategy} needs reference losses: give weights.reference")
        self._table = table
        self._domains = domains
        self._settings = weights
        self.interval = weights.interval(total_steps)
        self._reference = reference
        self._target = None if weights.target is None else table.id_of(weights.target)
        self._schedule = resolve_schedule(weights.schedule, table) if self._strategy.is_scheduled else {}
        require_limits(self._schedule, table, domains)
        self._start = self._schedule.get(0, initial_weights(domains, weights, table))
        # no step limit before the first step: floor and cap hold from the start
        self._limits = domains.model_dump(include={"min_weight", "max_weight"})
        self._initial = limit_weights(self._start, self._start, **self._limits)
        k = len(table)
        self._weights = self._initial
        self._guard = None if weights.guard is None else OverfitGuard(table.names, weights.guard)
        objective = weights.objective or dict.fromkeys(table.names, 1.0 / k)
        by_gain = self._strategy.by_gain
        self._gains = MarginalGains(table.vector(objective, "weights.objective")) if by_gain else None
        self._window = DomainSums.zeros(k)
        self._losses = np.zeros(k)
        self._stderr = np.full(k, np.nan)
        self._measured = np.zeros(k, dtype=np.bool_)
        self._update_count = 0
        self._last_step = 0

    @property
    def weights(self) -> Vector:
        """float64[k], a copy of the weights in force: the strategy's, less what the guard holds."""
        if self._guard is None or self._settings.shadow:
            return self._weights.copy()
        return self._guard.guarded(self._weights, self._domains)

    @property
    def window(self) -> DomainSums:
        """Sums observed since the last update."""
        return self._window

    @property
    def needs_probe(self) -> bool:
        """Whether `update` expects the losses of a held-out probe."""
        return self._settings.needs_probe

    @property
    def needs_samples(self) -> bool:
        """Whether it expects them sample by sample."""
        return self._guard is not None or self._gains is not None

    @property
    def kept_steps(self) -> set[int]:
        """Steps whose checkpoints the guard may go back to."""
        return set() if self._guard is None else self._guard.kept_steps

    def back_to(self, step: int) -> int | None:
        """Step whose checkpoint the run goes back to after `step`, if the guard says so there."""
        return None if self._guard is None or self._last_step != step else self._guard.back_to

    def digest(self) -> int:
        """63-bit hash of the weights in force, to be equal on all ranks."""
        return weights_digest(self.weights)

    def observe(self, step_sums: DomainSums | npt.NDArray[np.float64]) -> None:
        """Add a training step's sums (float64[NUM_ROWS, k], reduced over all ranks) to the window.

        Raises:
            ValueError: wrong shape, or not finite (a step that was skipped must not be observed).
        """
        self._window = self._window + self._checked_sums(step_sums)

    def drop_window(self) -> None:
        """Forget the sums since the last update: those to come include them, or were measured anew."""
        self._window = DomainSums.zeros(len(self._table))

    def due(self, step: int, *, skipped: bool = False) -> bool:
        """Whether `update(step)` is to be called after `step` optimizer steps; pure.

        Args:
            skipped: the last of them was not applied. What its losses would have moved waits for the next
                update, whose window then is longer; a schedule asks no losses and does not wait.
        """
        asked = not skipped and step > 0 and step % self.interval == 0
        if self._strategy.is_scheduled:
            return (step > 0 and step in self._schedule) or (self._guard is not None and asked)
        return asked

    def initial_update(self) -> WeightUpdate:
        """The record of step 0: the initial weights and what floor and cap changed in them."""
        k = len(self._table)
        nothing, unmeasured = DomainSums.zeros(k), np.zeros(k, dtype=np.bool_)
        measurement = Measurement(
            losses=np.zeros(k), stderr=np.full(k, np.nan), measured=unmeasured, present=unmeasured,
            gamma=np.zeros(k), phi=np.zeros(k), reasons=["initial weights"],
        )  # fmt: skip
        reasons = limit_reasons(self._table.names, self._start, self._initial)
        proposal = Proposal(rule=self._start, after=self._initial, gate=None, reasons=reasons)
        record = self._record(0, nothing, measurement, proposal)
        return replace(record, before=record.proposed, applied=True, alarms=[])

    def starting_alarms(self, sums: DomainSums) -> list[str]:
        """Alarms of the reference losses before the first step.

        Args:
            sums: held-out sums of the untrained model; of no domain where nothing was measured, which leaves
                the alarms that need no losses.
        """
        if self._reference is None or not self._strategy.compares:
            return []
        measured = sums.tokens > 0
        losses, lref = np.nan_to_num(sums.mean_loss()), self._reference.losses
        gamma = learnable_potential(losses, lref)
        return reference_alarms(self._table, losses, lref, np.where(measured, gamma, 0.0), measured)

    def update(
        self, step: int, probe: DomainSums | SampleLosses | npt.NDArray[np.float64] | None = None
    ) -> WeightUpdate:
        """Compute new weights from the window, put them in force (unless `shadow`), reset the window.

        Args:
            step: optimizer steps done, larger than at the last update.
            probe: held-out losses, exactly when `needs_probe`: sums (float64[NUM_ROWS, k]), or with
                `needs_samples` those of every sample.

        Raises:
            ValueError: `step` does not rise, or probe sums are missing or unexpected.
        """
        if step <= self._last_step:
            raise ValueError(f"update at step {step} after one at step {self._last_step}: steps must rise")
        if (probe is not None) != self.needs_probe or isinstance(probe, SampleLosses) != self.needs_samples:
            raise ValueError(f"loss_source is {self._settings.loss_source}: probe sums missing or unexpected")
        sums = self._window
        if probe is not None and self._settings.loss_source == "probe":
            sums = self._checked_sums(probe.sums if isinstance(probe, SampleLosses) else probe)
        measurement = self._measure(sums)
        if self._gains is not None and isinstance(probe, SampleLosses):
            self._gains.observe(probe, self._window.tokens)
            measurement.reasons.append(self._gains.sentence(self._table.names))
        proposal = self._propose(step, sums, measurement)
        record = self._record(step, sums, measurement, proposal)
        if self._guard is not None and isinstance(probe, SampleLosses):
            record = self._guard_record(self._guard, step, probe, record, proposal.after)
        if not self._settings.shadow:
            self._weights = proposal.after
        if not proposal.refused:
            self._losses, self._stderr = measurement.losses, measurement.stderr
            self._measured = measurement.measured
            self.drop_window()
        self._update_count += 1
        self._last_step = step
        return record

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs; JSON-exact."""
        own = {"guard": self._guard, "gains": self._gains}
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint(),
            "weights": self._weights.tolist(),
            "initial": self._initial.tolist(),
            "window": self._window.to_json(),
            "losses": optional(self._losses, self._measured),
            "stderr": optional(self._stderr, ~np.isnan(self._stderr)),
            "update_count": self._update_count,
            "last_step": self._last_step,
            **{name: each.state() for name, each in own.items() if each is not None},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; nothing is changed when it is refused.

        Raises:
            StateError: another version, domains, strategy or loss source, or damaged values.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"weight controller state has version {state.get('version')!r}; this program reads "
                f"version {STATE_VERSION}"
            )
        ours, theirs = self._fingerprint(), state.get("fingerprint")
        if theirs != ours:
            raise StateError(
                f"weight controller state belongs to {theirs}; this run has {ours}: "
                "resume with the same domains, strategy and loss_source, or start a new run"
            )
        k = len(self._table)
        try:
            weights = loaded_weights(state["weights"], k)
            initial = loaded_weights(state["initial"], k)
            window = DomainSums.from_json(state["window"])
            losses, stderr = loaded_optional(state["losses"], k), loaded_optional(state["stderr"], k)
            update_count, last_step = int(state["update_count"]), int(state["last_step"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"weight controller state is damaged: {error!r}") from None
        if window.num_domains != len(self._table):
            raise StateError(f"weight controller state has a window of {window.num_domains} domains")
        guard, gains = copy(self._guard), copy(self._gains)
        if guard is not None and "guard" in state:  # else it begins to watch now
            guard.load_state(state["guard"])
        if gains is not None:
            gains.load_state(state.get("gains", {}))
        self._guard, self._gains = guard, gains
        self._weights, self._initial, self._window = weights, initial, window
        self._measured = ~np.isnan(losses)
        self._losses, self._stderr = np.nan_to_num(losses), stderr
        self._update_count, self._last_step = update_count, last_step

    def _measure(self, sums: DomainSums, shift: Vector | float = 0.0) -> Measurement:
        """Losses of this window plus `shift`; an absent domain keeps its last loss and gamma, with phi 0."""
        settings = self._settings
        new_losses, new_stderr = sums.mean_loss() + shift, sums.stderr()
        present = sums.tokens >= settings.min_tokens
        if settings.noise_z > 0 or settings.update_z > 0:
            present &= ~np.isnan(new_stderr)  # noise cannot be subtracted that is not known
        first = present & ~self._measured
        losses = np.where(present, new_losses, self._losses)
        stderr = np.where(present, new_stderr, self._stderr)
        noise: dict[str, Any] = {"stderr": np.nan_to_num(stderr), "noise_z": settings.noise_z}
        phi = forgetting_degree(losses, self._losses, previous_stderr=np.nan_to_num(self._stderr), **noise)
        measured = self._measured | present
        gamma, reference = np.zeros(len(self._table)), self._reference
        if reference is not None:
            gamma = learnable_potential(losses, reference.losses, reference_stderr=reference.stderr, **noise)
        return Measurement(
            losses=losses,
            stderr=stderr,
            measured=measured,
            present=present,
            gamma=np.where(measured, gamma, 0.0),
            phi=np.where(present & ~first, phi, 0.0),
            reasons=measurement_reasons(self._table.names, sums, present, self._measured, settings),
        )

    def _inputs(self, step: int, measurement: Measurement) -> UpdateInputs:
        reference = np.zeros(len(self._table)) if self._reference is None else self._reference.losses
        gains = self._gains
        return UpdateInputs(
            weights=self._weights,
            losses=measurement.losses,
            measured=measurement.measured,
            reference=reference,
            gamma=measurement.gamma,
            phi=measurement.phi,
            advantage=None if gains is None else gains.advantage(self._weights, self._settings.noise_z),
            target=self._target,
            scheduled=self._schedule.get(step, self._weights),
        )

    def _propose(self, step: int, sums: DomainSums, measurement: Measurement) -> Proposal:
        """The rule's weights, and what floor, cap and step limit leave of them."""
        strategy, settings, before = self._strategy, self._settings, self._weights
        gate: GateDecision | None = None
        reasons, noise = [], None
        if measurement.present.any() or strategy.is_scheduled:
            inputs = self._inputs(step, measurement)
            rule, gate = strategy.propose(inputs, settings), strategy.decide(inputs, settings)
            reasons += [gate.reason] if gate is not None else []
            noise = self._noise(step, sums, measurement, rule)
            rule, reasons = (before.copy(), [*reasons, noise]) if noise else (rule, reasons)
        else:
            rule = before.copy()
            reasons.append("no domain was measured: the weights stand")
        # a schedule is taken as it is; its floor and cap were checked at the start
        after = rule
        if not strategy.is_scheduled:
            change = self._domains.max_relative_change
            after = limit_weights(rule, before, **self._limits, max_relative_change=change)
        reasons += limit_reasons(self._table.names, rule, after)
        if settings.shadow:
            reasons.append("shadow: computed, not applied")
        return Proposal(rule=rule, after=after, gate=gate, reasons=reasons, refused=noise is not None)

    def _noise(self, step: int, sums: DomainSums, measurement: Measurement, rule: Vector) -> str | None:
        """Why the rule's weights are within their noise, or None where they are not or nobody asks."""
        settings, strategy = self._settings, self._strategy
        if settings.update_z == 0 or not strategy.moves_with_losses:
            return None

        def moved(shift: Vector) -> Vector:
            return strategy.propose(self._inputs(step, self._measure(sums, shift)), settings)

        stderr = update_stderr(moved, np.where(measurement.present, measurement.stderr, 0.0))
        return refusal(self._weights, rule, stderr, settings.update_z)

    def _record(
        self, step: int, sums: DomainSums, measurement: Measurement, proposal: Proposal
    ) -> WeightUpdate:
        by_name, known = self._table.by_name, measurement.measured
        return WeightUpdate(
            step=step,
            strategy=self._settings.strategy,
            loss_source=self._settings.loss_source,
            losses=self._where(measurement.losses, known),
            stderr=self._where(measurement.stderr, ~np.isnan(measurement.stderr)),
            tokens=by_name(sums.tokens),
            samples=by_name(sums.samples),
            gamma=self._where(measurement.gamma, known & (self._reference is not None)),
            phi=by_name(measurement.phi),
            gate_open=None if proposal.gate is None else proposal.gate.is_open,
            before=by_name(self._weights),
            proposed=by_name(proposal.rule),
            after=by_name(proposal.after),
            applied=not self._settings.shadow,
            entropy=entropy(proposal.after),
            reasons=measurement.reasons + proposal.reasons,
            alarms=self._alarms(measurement, proposal.after),
            refused=proposal.refused,
        )

    def _guard_record(
        self, guard: OverfitGuard, step: int, probe: SampleLosses, record: WeightUpdate, after: Vector
    ) -> WeightUpdate:
        """The record with what the guard makes of the probe and of the strategy's new weights."""
        before = self.weights
        held, returned = guard.observe(step, probe, self._window)
        guarded = guard.guarded(after, self._domains)
        return replace(
            record,
            before=self._table.by_name(before),
            after=self._table.by_name(guarded),
            entropy=entropy(guarded),
            reasons=record.reasons + returned + guard.stands(after),
            alarms=record.alarms + held,
            guard=guard.to_json(),
        )

    def _alarms(self, measurement: Measurement, after: Vector) -> list[str]:
        if not self._strategy.moves_with_losses:
            return []
        alarms = weight_alarms(self._table, after, self._initial, self._domains)
        if self._reference is None or not self._strategy.compares:
            return alarms
        m, reference = measurement, self._reference.losses
        return reference_alarms(self._table, m.losses, reference, m.gamma, m.measured) + alarms

    def _checked_sums(self, sums: DomainSums | npt.NDArray[np.float64]) -> DomainSums:
        checked = sums if isinstance(sums, DomainSums) else DomainSums(sums)
        if checked.num_domains != len(self._table):
            raise ValueError(f"sums of {checked.num_domains} domains; the table has {len(self._table)}")
        return checked

    def _where(self, values: Vector, known: Mask) -> ByNameOrNone:
        return dict(zip(self._table.names, optional(values, known), strict=True))

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "domains": self._table.fingerprint,
            "names": list(self._table.names),
            "strategy": self._settings.strategy,
            "loss_source": self._settings.loss_source,
        }
