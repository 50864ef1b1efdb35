"""Settings of a study: many runs that differ in how they weigh domains, from one base model.

A study file names a corpus, a base model (a pretrained one, or a small one and the mixture that it is
pre-trained on), the settings that all runs share, and one *arm* per strategy. Every arm is trained with every
seed on the same number of tokens. Sections of a run (`data`, `weights`, ...) are plain mappings here and are
validated as a whole run (`config/schema.py`) once an arm and a seed are filled in. In their texts `{corpus}`
stands for the corpus folder.

What is not covered: the meaning of a run's settings, and which runs depend on which (`apps/study/jobs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from versatune_ds.config.load import load_settings
from versatune_ds.config.model import Adapter
from versatune_ds.config.section import Place, PlaceText, Section
from versatune_ds.config.weights import share_problems

Sections = dict[str, Any]
"""Sections of a run by name, each a mapping of its settings."""

OWNED_BY_STUDY = ("run", "model", "domains.initial", "weights.reference")
"""Settings that the study itself fills in; an arm may set `domains.initial`."""


class StudyModel(Section):
    """The base model: a pretrained one, or a Llama that is made for the study."""

    source: PlaceText | None = None
    """Folder or hub name of a pretrained model, with its tokenizer. None: one is made."""
    vocab_size: int = Field(8192, ge=512)
    """Entries of the tokenizer that is trained on the corpus. The sample brings its own tokenizer."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Compute precision of all runs."""
    adapter: Adapter | None = None
    """What reference runs and arms train beside the base model. None: all of it."""
    shape: dict[str, int] = Field(default_factory=dict)
    """Keys of a LlamaConfig that replace those of the shipped 4-layer shape of hidden size 128."""

    def problems(self) -> Iterator[str]:
        if self.source is not None and self.model_fields_set & {"vocab_size", "shape"}:
            yield "model.vocab_size and model.shape are of a model that is made; remove them or model.source"


class Pretraining(Section):
    """How the base model comes to know more of some domains than of others."""

    mixture: dict[str, float]
    """Share of every domain: the base model's knowledge distribution, which fine-tuning starts from."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation and sample order."""
    settings: Sections = Field(default_factory=dict)
    """Sections that differ from `settings` of the study, for example `train` and `optimizer`."""

    def problems(self) -> Iterator[str]:
        yield from share_problems(self.mixture, "pretraining.mixture")


class Expansion(Section):
    """Arms that grow one domain, compared with each other."""

    target: str
    """The domain to grow."""
    arms: list[str] = Field(min_length=1)
    """Names of arms."""


class Study(Section):
    """A whole study."""

    dir: Place
    """Folder of the study: model, cache, all runs, results."""
    corpus: Literal["sample"] | Place
    """Folder with raw files, or the shipped sample. VERSATUNE_CORPUS, where set, names another folder."""
    workers: int = Field(2, ge=1)
    """Runs trained at the same time, each a process of one rank; on GPUs one a device."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of sample order; every arm is trained with each."""
    model: StudyModel = StudyModel()
    pretraining: Pretraining | None = None
    """How the base model is made, where `model.source` does not name one."""
    mixture: dict[str, float] | Place | None = None
    """With `model.source`, the mixture that fine-tuning starts from: shares by domain, or the knowledge.json
    of a detection. A model that is made starts from that of its pre-training."""
    reference_seed: int = Field(0, ge=0)
    """Seed of the single-domain runs whose lowest held-out losses are the reference losses."""
    reference_evaluations: int = Field(4, ge=1)
    """How often such a run is evaluated."""
    settings: Sections
    """Sections of a run that all fine-tuning runs share."""
    baselines: list[str] = Field(min_length=1)
    """Arms that the others are compared with; the first one also domain by domain."""
    arms: dict[str, Sections] = Field(min_length=1)
    """Arm name -> the sections in which it differs."""
    expansions: list[Expansion] = Field(default_factory=list)
    """Arms that are judged by their target and by what the other domains lose."""
    objectives: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What users may want: name -> weight of every domain's held-out loss, as in `weights.objective`. Arms
    are compared by each of them, too."""

    def problems(self) -> Iterator[str]:
        for name in self.arms:
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                yield f"arm {name!r}: use letters, digits, '_', '-' and '.'"
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds repeat: {self.seeds}"
        if unknown := [name for name in self.baselines if name not in self.arms]:
            yield f"baselines: {unknown[0]!r} is no arm; arms: {list(self.arms)}"
        for expansion in self.expansions:
            if unknown := [name for name in expansion.arms if name not in self.arms]:
                yield f"expansions: {unknown[0]!r} is no arm; arms: {list(self.arms)}"
        given = {"pretraining": self.pretraining is not None, "mixture": self.mixture is not None}
        needed = "mixture" if self.model.source else "pretraining"
        if given != {name: name == needed for name in given}:
            why = "is given" if self.model.source else "is not given"
            yield f"model.source {why}: the study needs `{needed}`, and only that of {' and '.join(given)}"
        names = self.settings.get("domains", {}).get("names", [])
        for name, objective in self.objectives.items():
            yield from share_problems(objective, f"objectives.{name}")
            if set(objective) != set(names):
                yield f"objectives.{name} names {sorted(objective)}, domains.names {sorted(names)}"
        key = "pretraining.mixture" if self.pretraining else "mixture"
        if isinstance(self.initial, dict) and set(names) != set(self.initial):
            yield f"{key} names {sorted(self.initial)}, domains.names {sorted(names)}"

    @property
    def initial(self) -> dict[str, float] | Place | None:
        """Mixture that fine-tuning starts from, as in `domains.initial` of a run."""
        return self.pretraining.mixture if self.pretraining else self.mixture


def load_study(path: str | Path, overrides: list[str] | None = None) -> Study:
    """Read and validate a study file; `overrides` as for a run, e.g. `workers=4` or `seeds=[1,2]`.

    Raises:
        ConfigError: the file is missing or not YAML, or a setting is unknown or invalid.
    """
    return load_settings(Study, path, overrides or [])
