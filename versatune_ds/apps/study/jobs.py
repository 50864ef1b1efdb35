"""From a study's settings to its runs: pure functions, one complete `Config` per run.

    base        one run that makes the base model from random weights, on the skewed mixture; none where the
                study names a pretrained model
    reference   one run a domain, on that domain alone: its lowest held-out loss is the reference loss
    arms        every arm with every seed, from the base model, all on the same number of tokens

Runs of one line do not depend on each other. Fine-tuning starts from the detected knowledge distribution of
a pretrained model; that of one made here is known, the mixture of its pre-training.

What is not covered: training (`apps/study/run.py`), and what the losses amount to
(`apps/study/results.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from versatune_ds.apps.study.config import OWNED_BY_STUDY, Sections, Study
from versatune_ds.config.load import validate_config
from versatune_ds.config.schema import Config
from versatune_ds.domain.knowledge import read_knowledge
from versatune_ds.foundations.constants import EXPORT_DIR
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import canonical_hash

Kind = Literal["base", "reference", "arm"]
BASE_RUN = "base"


@dataclass(frozen=True)
class Job:
    kind: Kind
    arm: str
    """Name of the arm; of a reference run its domain."""
    seed: int
    config: Config
    data: str | None = None
    """Fingerprint of its prepared data, where they are not the study's."""

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.config.run.dir.name

    @property
    def total_steps(self) -> int:
        assert self.config.train.max_steps is not None
        return self.config.train.max_steps

    def perform(self, device: Any) -> None:
        """Train, in a process group that is already there."""
        from versatune_ds.engine.train import train_in_group

        train_in_group(self.config, device)

    def fingerprint(self, origin: str) -> str:
        """Hash of all settings and of `origin`, what else decides the result (data, base model)."""
        own = [] if self.data is None else [self.data]
        return canonical_hash([origin, self.config.model_dump(mode="json"), *own])


class StudyPlan:
    """Makes the jobs of a study.

    Args:
        study: its settings.
        corpus: folder that `{corpus}` stands for.
        model_folder: tokenizer and config.json of the model; of a pretrained one the model itself, or its
            name on a hub.

    Attributes:
        initial: mixture that fine-tuning starts from, shares by domain.

    Raises:
        ConfigError: the study sets what it fills in itself.
        DataError: the file of `mixture` is missing or no knowledge.json.
    """

    def __init__(self, study: Study, corpus: Path, model_folder: Path | str) -> None:
        self.study = study
        self._model_folder = model_folder
        self._corpus = str(corpus)
        _refuse_owned(study)
        self.initial = study.initial
        if isinstance(study.initial, Path):  # what it says decides the results, not where it lies
            self.initial = read_knowledge(study.initial, "mixture")["domains"]

    @property
    def domains(self) -> list[str]:
        """Domain names in table order."""
        return list(self.study.settings["domains"]["names"])

    def base(self) -> list[Job]:
        """The run that makes the base model; none for a pretrained one."""
        settings = self.study.pretraining
        if settings is None:
            return []
        layers: list[Sections] = [
            {"domains": {"initial": settings.mixture}, "weights": {"strategy": "constant"}},
            settings.settings,
            {"checkpoint": {"export_at_end": True}},
        ]
        model = {"source": str(self._model_folder), "weights": "random"}
        return [self._job("base", BASE_RUN, settings.seed, BASE_RUN, model, layers)]

    def references(self) -> list[Job]:
        """One single-domain run a domain."""
        jobs = []
        for name in self.domains:
            alone = {other: float(other == name) for other in self.domains}
            every = max(1, self._max_steps() // self.study.reference_evaluations)
            layers: list[Sections] = [
                {"domains": {"initial": alone, "min_weight": 0.0}, "weights": {"strategy": "constant"}},
                {"evaluation": {"every_n_steps": every}},
            ]
            jobs.append(self._tune("reference", name, self.study.reference_seed, layers))
        return jobs

    def arms(self, reference: Mapping[str, float]) -> list[Job]:
        """Every arm with every seed, seeds first, so that a part of the study is comparable too."""
        return [
            self._tune("arm", arm, seed, [{"weights": {"reference": dict(reference)}}, sections])
            for seed in self.study.seeds
            for arm, sections in self.study.arms.items()
        ]

    def all_jobs(self) -> list[Job]:
        """Every run, arms with reference losses that nobody has measured."""
        unknown = dict.fromkeys(self.domains, 1.0)
        return [*self.base(), *self.references(), *self.arms(unknown)]

    def check(self) -> int:
        """Validate every run before the first is trained, and count them; ConfigError: an invalid arm."""
        self._max_steps()
        jobs = self.all_jobs()
        for expansion in self.study.expansions:
            if expansion.target not in self.domains:
                raise ConfigError(f"expansions: {expansion.target!r} is no domain; domains: {self.domains}")
        return len(jobs)

    def _tune(self, kind: Kind, arm: str, seed: int, layers: Sequence[Sections]) -> Job:
        base = self.study.model.source or self.study.dir / "runs" / BASE_RUN / EXPORT_DIR
        adapter = self.study.model.adapter
        model = {"source": str(base), "adapter": adapter and adapter.model_dump(mode="json")}
        mixture: Sections = {"domains": {"initial": self.initial}}
        prefix = "reference_" if kind == "reference" else ""
        name = f"{prefix}{arm}_seed-{seed}"
        return self._job(kind, arm, seed, name, model, [mixture, *layers])

    def _job(
        self, kind: Kind, arm: str, seed: int, name: str, model: Mapping[str, Any], layers: Sequence[Sections]
    ) -> Job:
        own: Sections = {
            "run": {"dir": str(self.study.dir / "runs" / name), "seed": seed},
            "model": {"tokenizer": str(self._model_folder), "dtype": self.study.model.dtype, **model},
            "data": {"cache_dir": str(self.study.dir / "cache")},
            "evaluation": {"every_n_steps": self._max_steps(layers)},
            "checkpoint": {"export_at_end": False},
        }
        text = json.dumps(merge([own, self.study.settings, *layers]))
        raw = json.loads(text.replace("{corpus}", json.dumps(self._corpus)[1:-1]))
        return Job(kind, arm, seed, validate_config(raw, f"study: run {name}"))

    def _max_steps(self, layers: Sequence[Sections] = ()) -> int:
        steps = merge([self.study.settings, *layers]).get("train", {}).get("max_steps")
        if not isinstance(steps, int):
            raise ConfigError("study: settings.train.max_steps is needed: arms are compared at equal tokens")
        return steps


def merge(layers: Sequence[Sections]) -> Sections:
    """Sections key by key, later layers win; values below a key (a mapping by domain, say) are not mixed."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            both = isinstance(values, dict) and isinstance(merged.get(section), dict)
            merged[section] = {**merged[section], **values} if both else values
    return merged


def _refuse_owned(study: Study) -> None:
    for setting in OWNED_BY_STUDY:
        section, _, key = setting.partition(".")
        found = study.settings.get(section)
        if found is not None and (not key or key in found):
            raise ConfigError(f"study: settings.{setting} is filled in by the study; remove it")
