"""From a run's settings to the runs of its search: pure functions, one complete `Config` per run.

    proxy     the run, short, on a fixed mixture
    single    the same with an adapter, on one domain; the adapter is kept
    merged    no run: the weighted sum of the adapters is evaluated

All have the run's data, tokenizer, optimizer and weight unit.

What is not covered: which mixtures (`design`, `choice`), and working the jobs off (`apps/study/run.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.apps.search.surface import Array
from versatune_ds.apps.study.jobs import Job
from versatune_ds.config.derive import ADAPTER_RATE, fix_shares
from versatune_ds.config.load import validate_config
from versatune_ds.config.model import Adapter
from versatune_ds.config.schema import Config
from versatune_ds.config.search import Search
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.faults.signals import StopRequest
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import folder_name


class MergedJob(Job):
    """Evaluates a model that exists already."""

    def perform(self, device: Any) -> None:
        """Held-out losses by domain as the only line of eval.jsonl."""
        from versatune_ds.apps.evaluate.held_out import free_memory
        from versatune_ds.engine.backend.deepspeed_backend import build_for_evaluation
        from versatune_ds.engine.evaluate import HeldOut, evaluate
        from versatune_ds.engine.prepared import prepare_run

        config = self.config
        with StopRequest():  # it takes seconds: a request to stop waits for its end
            prepared = prepare_run(config, device.type)
            limit = config.evaluation.max_samples_per_domain
            held_out = HeldOut(
                prepared.evaluated, config.batch.pack_len, limit, prepared.pad_id, prepared.ranks
            )
            found = evaluate(build_for_evaluation(config, device), held_out, len(prepared.table))
            free_memory()
            losses = prepared.table.by_name(found.sums.mean_loss())
            line = json.dumps({"step": self.total_steps, "domain_loss": losses})
            (config.run.dir / constants.EVAL_FILE).write_text(line + "\n", encoding="utf-8")


class SearchPlan:
    """Makes the jobs of a search; ConfigError for settings that do not go with it."""

    def __init__(self, config: Config, folder: Path) -> None:
        if config.search is None:
            raise ConfigError("section search is missing; it needs at least budget_tokens and steps")
        self.settings: Search = config.search
        self.table = DomainTable(config.domains.names)
        self._config = config
        self._folder = folder
        self._model = self.settings.model or config.model
        self._adapter = self._model.adapter
        if self.settings.way == "adapters":
            self._adapter = self._adapter or Adapter()
            if self._model.weights == "random":
                raise ConfigError("search.way adapters: model.weights random has nothing to stand beside")
            if self._adapter.kind == "dora" or self._adapter.start_from is not None:
                raise ConfigError("search.way adapters adds up new LoRA adapters; no dora, no start_from")

    @property
    def run_tokens(self) -> int:
        """Most tokens of a run."""
        packs = self.settings.packs_per_step or self._config.batch.packs_per_step
        return self.settings.steps * packs * self._config.batch.pack_len

    def proxy(self, name: str, shares: Array, seed: int) -> Job:
        """A run on a mixture (float64[k])."""
        return Job("arm", name, *self._derive(name, shares, self._adapter, seed=seed))

    def any_run(self) -> Job:
        """One that stands for all: they differ in their mixtures only."""
        return self.proxy("any", np.full(len(self.table), 1 / len(self.table)), self._config.run.seed)

    def single(self, domain: int) -> Job:
        """The run that trains a domain's adapter."""
        name = f"adapter-{folder_name(self.table.names[domain])}"
        alone = np.eye(len(self.table))[domain]
        return Job(
            "arm", name, *self._derive(name, alone, self._adapter, keep=True, seed=self._config.run.seed)
        )

    def merged(self, name: str, shares: Array) -> Job:
        """The evaluation of the sum of all adapters, weighted by a mixture (float64[k])."""
        assert self._adapter is not None
        parts = {
            str(self.single(domain).config.run.dir / constants.EXPORT_DIR): float(share)
            for domain, share in enumerate(shares)
            if share > 0
        }
        sums = {"rank": len(parts) * self._adapter.rank, "alpha": len(parts) * self._adapter.alpha}
        adapter = self._adapter.model_copy(update={**sums, "start_from": parts})
        return MergedJob("arm", name, *self._derive(name, shares, adapter, seed=self._config.run.seed))

    def settings_that_matter(self) -> dict[str, Any]:
        """What decides the results of the runs, beside data and model: section -> settings."""
        raw = self.any_run().config.model_dump(mode="json")
        raw["run"].pop("dir")
        raw["domains"].pop("initial")
        raw["evaluation"].pop("every_n_steps")  # train.max_steps
        return {**raw, "search": {"way": self.settings.way}}

    def _derive(
        self,
        name: str,
        shares: Array,
        adapter: Adapter | None,
        *,
        keep: bool = False,
        seed: int,
    ) -> tuple[int, Config]:
        """Seed and settings of a run; `keep`: export what it trained."""
        config, settings, steps = self._config, self.settings, self.settings.steps
        raw = config.model_dump(mode="json")
        added = (adapter is not None) - (config.model.adapter is not None)
        raw["run"] |= {"dir": str(self._folder / "runs" / name), "resume": "auto", "seed": seed}
        raw["model"] = {
            **self._model.model_dump(mode="json"),
            "tokenizer": config.model.tokenizer or config.model.source,
            "adapter": adapter and adapter.model_dump(mode="json"),
        }
        fix_shares(raw, self.table.by_name(shares))
        raw["batch"] |= {
            "packs_per_step": settings.packs_per_step or config.batch.packs_per_step,
            "sequence_parallel": 1,
        }
        raw["optimizer"]["lr"] = settings.lr or config.optimizer.lr * ADAPTER_RATE**added
        raw["train"] |= {"max_steps": steps, "epochs": None, "profile": None}
        raw["evaluation"] |= {"every_n_steps": steps, "domains": None, "patience": None, "select": None}
        raw["checkpoint"] = {"keep_last": 1, "export_at_end": keep}
        raw["metrics"] = {}
        raw["search"] = None
        return seed, validate_config(raw, f"settings of the run {name} of the search").like(config)
