"""Variants of the weight settings: every combination of values given for some keys, each a valid `Config`.

What is not covered: what the variants do with losses (`domain/history.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from versatune_ds.config.load import apply_override, load_config, validate_config
from versatune_ds.config.schema import Config, Domains, Weights
from versatune_ds.foundations.errors import ConfigError

MAX_VARIANTS = 24
VARIED_SECTIONS = ("domains", "weights")


@dataclass(frozen=True)
class Variant:
    """One combination."""

    label: str
    """The varied values, `sigma 0.5, form linear`; the strategy where nothing is varied."""
    domains: Domains
    weights: Weights


def combinations(vary: Sequence[str]) -> list[list[str]]:
    """Overrides of each variant from texts like `weights.sigma=0.5,1,2`; one empty list without any.

    Raises:
        ConfigError: a text has no values, names another section, or there are too many combinations.
    """
    axes = []
    for text in vary:
        key, equals, values = text.partition("=")
        choices = [value.strip() for value in values.split(",")]
        if not equals or not all(choices):
            raise ConfigError(f"--vary {text!r}: write it as section.key=value,value")
        if key.split(".")[0] not in VARIED_SECTIONS:
            raise ConfigError(f"--vary {text!r}: only {' and '.join(VARIED_SECTIONS)} decide the weights")
        axes.append([f"{key.strip()}={choice}" for choice in choices])
    found = [list(combination) for combination in itertools.product(*axes)]
    if len(found) > MAX_VARIANTS:
        raise ConfigError(f"--vary asks for {len(found)} variants; at most {MAX_VARIANTS} fit a picture")
    return found


def make_variants(
    config_path: Path | None, names: Sequence[str], overrides: Sequence[str], vary: Sequence[str]
) -> list[Variant]:
    """All variants, validated as parts of a run.

    Args:
        config_path: settings of a run; None: defaults, with the domains `names`.
        overrides: `section.key=value`, for all variants.
        vary: see `combinations`.

    Raises:
        ConfigError: a variant is not a valid setting.
    """
    variants = []
    for chosen in combinations(vary):
        # the history's losses stand for whatever source they came from, and a plan applies what it computes
        every = [*overrides, *chosen, "weights.loss_source=train", "weights.shadow=false"]
        config = _defaults(names, every) if config_path is None else load_config(config_path, every)
        label = ", ".join(text.split(".", 1)[1].replace("=", " ") for text in chosen)
        variants.append(Variant(label or config.weights.strategy, config.domains, config.weights))
    return variants


def _defaults(names: Sequence[str], overrides: Sequence[str]) -> Config:
    """A run of which only domains and weights are looked at."""
    raw = {
        "run": {"dir": "unused"},
        "model": {"source": "unused"},
        "data": {"train": [{"path": "unused", "domain": names[0]}]},
        "domains": {"names": list(names)},
        "batch": {"packs_per_step": 1},
        "train": {"max_steps": 1},
    }
    for override in overrides:
        apply_override(raw, override)
    return validate_config(raw, "plan-weights")
