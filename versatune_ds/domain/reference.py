"""Reference losses lref and initial weights: what a run is given before its first step.

A reference loss is a *held-out* loss in nats per supervised token. A training-set minimum is near 0 for
every domain, which makes gamma about 1 everywhere and the weights stand still.

Format of reference.json (order of domains is free; `stderr` and `fingerprints` may be left out):

    {"format": "versatune_ds.reference", "version": 1,
     "losses": {"law": 1.91, ...},            nats per supervised token, > 0
     "stderr": {"law": 0.02, ...},            standard errors of the losses
     "fingerprints": {"model": "...", "tokenizer": "...", "data": "..."}}

What is not covered: measuring reference losses, and the format of knowledge.json (`knowledge.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.config.schema import Domains, Weights, require_shares
from versatune_ds.domain.json_input import numbers, read_object
from versatune_ds.domain.knowledge import read_knowledge
from versatune_ds.domain.simplex import normalise
from versatune_ds.domain.statistics import Vector
from versatune_ds.domain.table import DomainTable
from versatune_ds.domain.updaters import STATIC_WEIGHTS
from versatune_ds.foundations.errors import ConfigError, DataError, unknown_name

REFERENCE_FORMAT = "versatune_ds.reference"
REFERENCE_VERSION = 1
REFERENCE_KEYS = ("format", "version", "losses", "stderr", "fingerprints")


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

    def to_json(self, table: DomainTable) -> dict[str, Any]:
        """Content of a reference.json."""
        return {
            "format": REFERENCE_FORMAT,
            "version": REFERENCE_VERSION,
            "losses": table.by_name(self.losses),
            "stderr": table.by_name(self.stderr),
            "fingerprints": {k: v for k, v in asdict(self.fingerprints).items() if v is not None},
        }


def load_reference(
    source: Mapping[str, float] | Path | None,
    table: DomainTable,
    expected: Fingerprints | None = None,
) -> ReferenceLosses | None:
    """Reference losses from `weights.reference`.

    Args:
        source: losses by domain, a reference.json, or None.
        table: the domains; the reference must name exactly these.
        expected: fingerprints of the run. One that is known on both sides must be equal. The tokenizer's
            always matters (it decides what a token is); pass the model's or the data's only if a reference
            from another one is wrong for the study.

    Raises:
        ConfigError: domains or fingerprints differ, or a loss is not a number > 0.
        DataError: the file is missing, not JSON, or not in the format above.
    """
    if source is None:
        return None
    if isinstance(source, Mapping):
        return _checked(dict(source), {}, Fingerprints(), table, "weights.reference")
    path = Path(source)
    raw = read_object(path, "weights.reference")
    if raw.get("format") != REFERENCE_FORMAT or raw.get("version") != REFERENCE_VERSION:
        raise DataError(
            f"format {raw.get('format')!r}, version {raw.get('version')!r}; expected "
            f"{REFERENCE_FORMAT!r}, version {REFERENCE_VERSION}",
            path=path,
        )
    for key in raw:
        if key not in REFERENCE_KEYS:
            raise DataError(unknown_name("key", key, REFERENCE_KEYS), path=path)
    losses = numbers(raw.get("losses"), "losses", path)
    stderr = numbers(raw.get("stderr", {}), "stderr", path)
    found = _fingerprints(raw.get("fingerprints", {}), path)
    _require_same(found, expected or Fingerprints(), path)
    return _checked(losses, stderr, found, table, str(path))


def prior_weights(domains: Domains, table: DomainTable) -> Vector:
    """`domains.initial` as float64[k] on the simplex: uniform, given shares, or a knowledge.json.

    A knowledge.json holds `{"domains": {name: probability}}`; other keys are `knowledge.py`'s. Shares may be
    rounded (see `WEIGHT_SUM_TOLERANCE` in the schema) and are scaled to sum 1.

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
        require_shares(shares, what)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{error}{cure}") from None
    return normalise(vector)


def initial_weights(domains: Domains, weights: Weights, table: DomainTable) -> Vector:
    """Weights before the first step, float64[k] on the simplex, floor and cap not yet applied.

    The static strategies `uniform` and `inverse` turn the prior p of `domains.initial` into their weights;
    all others start from p itself.

    Raises:
        ConfigError, DataError: as `prior_weights`.
    """
    prior = prior_weights(domains, table)
    return STATIC_WEIGHTS.get(weights.strategy, STATIC_WEIGHTS["constant"])(prior)


def _checked(
    losses: Mapping[str, float],
    stderr: Mapping[str, float],
    fingerprints: Fingerprints,
    table: DomainTable,
    what: str,
) -> ReferenceLosses:
    values = table.vector(losses, f"{what}: losses")
    errors = table.vector(stderr, f"{what}: stderr") if stderr else np.zeros(len(table))
    for name, value, error in zip(table.names, values, errors, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{what}: the reference loss of {name} is {value}; it must be > 0")
        if not (np.isfinite(error) and error >= 0):
            raise ConfigError(f"{what}: the standard error of {name} is {error}; it must be >= 0")
    return ReferenceLosses(losses=values, stderr=errors, fingerprints=fingerprints)


def _require_same(found: Fingerprints, expected: Fingerprints, path: Path) -> None:
    for item in fields(Fingerprints):
        theirs, ours = getattr(found, item.name), getattr(expected, item.name)
        if theirs is not None and ours is not None and theirs != ours:
            raise ConfigError(
                f"{path}: measured with another {item.name} (fingerprint {theirs}; this run has {ours}); "
                "its losses cannot be compared: measure the reference again for this run"
            )


def _fingerprints(raw: Any, path: Path) -> Fingerprints:
    known = [item.name for item in fields(Fingerprints)]
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        raise DataError("fingerprints must be texts by name", path=path)
    for name in raw:
        if name not in known:
            raise DataError(unknown_name("fingerprint", name, known), path=path)
    return Fingerprints(**raw)
