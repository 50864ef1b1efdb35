"""Reference losses lref and initial weights: what a run is given before its first step.

A reference loss is a *held-out* loss in nats per supervised token. A training-set minimum is near 0 for
every domain, which makes gamma about 1 everywhere and the weights stand still.

Format of reference.json (order of domains is free; all but the first three may be left out):

    {"format": "versatune_ds.reference", "version": 1,
     "losses": {"law": 1.91, ...},            nats per supervised token, > 0
     "stderr": {"law": 0.02, ...},            standard errors of the losses
     "bytes_per_token": {"law": 4.3, ...},    UTF-8 bytes of supervised text per supervised token, > 0
     "fingerprints": {"model": "...", "tokenizer": "...", "data": "..."},
     "method": "early_stopping",              or "evaluated", "given": how the losses were found
     "provenance": {...}}                     when, with what, per domain; for people

Another tokenizer makes other tokens, so its nats per token cannot be compared. Bits per byte can: with b the
bytes per token of each side, l / (b ln 2) bits per byte. `loss_unit: byte` therefore turns a reference loss
into lref * b_run / b_reference nats per token of the run, which leaves every ratio (gamma, phi) as it would
be in bits per byte.

What is not covered: measuring reference losses (`apps/reference.py`), counting bytes
(`data/cache/text_bytes.py`), and the format of knowledge.json (`knowledge.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.config.weights import Domains, Weights, share_problems
from versatune_ds.domain.knowledge import read_knowledge
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError, unknown_name
from versatune_ds.foundations.json_input import numbers, read_object, require_format
from versatune_ds.strategies.rules import STRATEGIES
from versatune_ds.strategies.simplex import Vector, normalise

REFERENCE_FORMAT = "versatune_ds.reference"
REFERENCE_VERSION = 1
REFERENCE_KEYS = (
    *("format", "version", "losses", "stderr", "bytes_per_token", "fingerprints", "method", "provenance"),
)
MEASURE_AGAIN = "measure it again (the verb reference)"

CURES = {
    "model": f"{MEASURE_AGAIN}, or name the model that it was measured with in reference.model",
    "tokenizer": f"{MEASURE_AGAIN} with this run's tokenizer, or set weights.loss_unit: byte",
    "data": f"the held-out data (data.eval) changed since; {MEASURE_AGAIN}",
}


@dataclass(frozen=True)
class Fingerprints:
    """What losses were measured with; None: not known, so not compared."""

    model: str | None = None
    tokenizer: str | None = None
    data: str | None = None


@dataclass(frozen=True, eq=False)
class ReferenceLosses:
    """Held-out losses to compare with; nats per supervised token, in table order."""

    losses: Vector
    """float64[k], > 0."""
    stderr: Vector
    """float64[k], standard errors; 0 where not known."""
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    bytes_per_token: Vector | None = None
    """float64[k], > 0: UTF-8 bytes of supervised text per supervised token; None: not known."""
    method: str | None = None
    """`early_stopping`, `evaluated` or `given`; None: not known."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Facts for people."""

    def to_json(self, table: DomainTable) -> dict[str, Any]:
        content: dict[str, Any] = {
            "format": REFERENCE_FORMAT,
            "version": REFERENCE_VERSION,
            "losses": table.by_name(self.losses),
            "stderr": table.by_name(self.stderr),
            "fingerprints": {k: v for k, v in asdict(self.fingerprints).items() if v is not None},
        }
        if self.bytes_per_token is not None:
            content["bytes_per_token"] = table.by_name(self.bytes_per_token)
        if self.method is not None:
            content["method"] = self.method
        if self.provenance:
            content["provenance"] = dict(self.provenance)
        return content

    def in_tokens_of(self, bytes_per_token: Vector) -> ReferenceLosses:
        """The same losses in nats per token of another tokenizer: equal bits per byte of text.

        Args:
            bytes_per_token: float64[k], of that tokenizer.

        Raises:
            ConfigError: this side's bytes per token are not known.
        """
        if self.bytes_per_token is None:
            raise ConfigError(
                "weights.loss_unit is byte, and the reference has no bytes_per_token: "
                f"{MEASURE_AGAIN}, or set loss_unit: token"
            )
        ratio = bytes_per_token / self.bytes_per_token
        return replace(
            self, losses=self.losses * ratio, stderr=self.stderr * ratio, bytes_per_token=bytes_per_token
        )


def load_reference(
    source: Mapping[str, float] | Path | None,
    table: DomainTable,
    expected: Fingerprints | None = None,
    bytes_per_token: Vector | None = None,
) -> ReferenceLosses | None:
    """Reference losses from `weights.reference`.

    Args:
        source: losses by domain, a reference.json, or None.
        table: the domains; the reference must name exactly these.
        expected: fingerprints of the run. One that is known on both sides must be equal. The tokenizer's
            always matters (it decides what a token is); pass the model's or the data's only if a reference
            from another one is wrong for the study.
        bytes_per_token: float64[k] of the run's tokenizer, for `weights.loss_unit: byte`: the tokenizers may
            differ, and losses and standard errors come back in nats per token of the run.

    Raises:
        ConfigError: domains or fingerprints differ, or a loss is not a number > 0.
        DataError: the file is missing, not JSON, or not in the format above.
    """
    if source is None:
        return None
    if isinstance(source, Mapping):
        return checked_losses(dict(source), {}, Fingerprints(), table, "weights.reference")
    path = Path(source)
    raw = read_object(path, "weights.reference")
    require_format(raw, REFERENCE_FORMAT, REFERENCE_VERSION, path, MEASURE_AGAIN)
    _require_known("key", raw, REFERENCE_KEYS, path)
    losses = numbers(raw.get("losses"), "losses", path)
    stderr = numbers(raw.get("stderr", {}), "stderr", path)
    sizes = numbers(raw["bytes_per_token"], "bytes_per_token", path) if "bytes_per_token" in raw else None
    method, provenance = raw.get("method"), raw.get("provenance", {})
    if not isinstance(method, str | None) or not isinstance(provenance, dict):
        raise DataError("method must be a text and provenance an object", path=path)
    found = _fingerprints(raw.get("fingerprints", {}), path)
    wanted = expected or Fingerprints()
    _require_same(found, wanted if bytes_per_token is None else replace(wanted, tokenizer=None), path)
    reference = replace(
        checked_losses(losses, stderr, found, table, str(path)),
        bytes_per_token=None if sizes is None else _positive(sizes, table, f"{path}: bytes_per_token"),
        method=method,
        provenance=provenance,
    )
    return reference if bytes_per_token is None else reference.in_tokens_of(bytes_per_token)


def prior_weights(domains: Domains, table: DomainTable) -> Vector:
    """`domains.initial` as float64[k] on the simplex: uniform, given shares, or a knowledge.json.

    A knowledge.json holds `{"domains": {name: probability}}`; other keys are `knowledge.py`'s. Shares may be
    rounded (see `WEIGHT_SUM_TOLERANCE` in config/weights.py) and are scaled to sum 1.

    Raises:
        ConfigError: the shares are not those of the table's domains, or do not sum to 1.
        DataError: the file is missing or not of this form.
    """
    initial = domains.initial
    if isinstance(initial, dict):
        shares, what, cure = initial, "domains.initial", ""
    elif isinstance(initial, Path):
        shares, what = read_knowledge(initial, "domains.initial")["domains"], str(initial)
        cure = "; run versatune-ds detect for these domains.names, or give shares in domains.initial"
    else:
        return np.full(len(table), 1.0 / len(table))
    try:
        vector = table.vector(shares, what)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{error}{cure}") from None
    if found := list(share_problems(shares, what)):
        raise ConfigError(f"{'; '.join(found)}{cure}")
    return normalise(vector)


def initial_weights(domains: Domains, weights: Weights, table: DomainTable) -> Vector:
    """Weights before the first step, float64[k] on the simplex, floor and cap not yet applied.

    `uniform` and `inverse` turn the prior p of `domains.initial` into their weights; others start from p.

    Raises:
        ConfigError, DataError: as `prior_weights`.
    """
    return STRATEGIES[weights.strategy].start(prior_weights(domains, table))


def checked_losses(
    losses: Mapping[str, float],
    stderr: Mapping[str, float],
    fingerprints: Fingerprints,
    table: DomainTable,
    what: str,
) -> ReferenceLosses:
    """Reference losses by name, checked.

    Args:
        losses: nats per supervised token, > 0.
        stderr: standard errors, >= 0; empty: not known.
        what: where they come from, for error texts.

    Raises:
        ConfigError: a domain is missing or unknown, or a value is out of bounds.
    """
    values = table.vector(losses, f"{what}: losses")
    errors = table.vector(stderr, f"{what}: stderr") if stderr else np.zeros(len(table))
    for name, value, error in zip(table.names, values, errors, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{what}: the reference loss of {name} is {value}; it must be > 0")
        if not (np.isfinite(error) and error >= 0):
            raise ConfigError(f"{what}: the standard error of {name} is {error}; it must be >= 0")
    return ReferenceLosses(losses=values, stderr=errors, fingerprints=fingerprints)


def _positive(values: Mapping[str, float], table: DomainTable, what: str) -> Vector:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{what}: {name} has {value}; it must be > 0")
    return table.vector(values, what)


def _require_same(found: Fingerprints, expected: Fingerprints, path: Path) -> None:
    for item in fields(Fingerprints):
        theirs, ours = getattr(found, item.name), getattr(expected, item.name)
        if theirs is not None and ours is not None and theirs != ours:
            raise ConfigError(
                f"{path}: measured with another {item.name} (fingerprint {theirs[:12]}; this run has "
                f"{ours[:12]}); its losses cannot be compared: {CURES[item.name]}"
            )


def _fingerprints(raw: Any, path: Path) -> Fingerprints:
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        raise DataError("fingerprints must be texts by name", path=path)
    _require_known("fingerprint", raw, [item.name for item in fields(Fingerprints)], path)
    return Fingerprints(**raw)


def _require_known(kind: str, names: Iterable[str], known: Sequence[str], path: Path) -> None:
    for name in names:
        if name not in known:
            raise DataError(unknown_name(kind, name, known), path=path)
