"""Searching: rounds of runs or evaluations, the journal between them, and what was found.

    data prepared -> [an adapter a domain] -> rounds: mixtures chosen, tried -> the best one -> a run of it
    -> mixture.json, index.html

Runs are those of `apps/study/run.py`: a finished one is kept. search.json holds the settings that decide
their results, and the mixtures of every round, written before the first run of the round; a search that was
killed goes on with them. With other settings it is refused, but for what only chooses among results
(objective, limits, bounds) or adds to them (budget, rounds). Several processes may share the runs of a round
(`search.part`): each ends when its own are done, and one that finds a round whole begins the next.

mixture.json has the format of a knowledge.json (`domain/knowledge.py`), so that `domains.initial` takes it,
and under `search` all that was found (`Exploration.describe`).

What is not covered: which mixtures (`design`, `choice`), the page (`page`).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from versatune_ds.apps.search import choice
from versatune_ds.apps.search.bounds import Bounds
from versatune_ds.apps.search.choice import Goal
from versatune_ds.apps.search.design import count, first_points, round_size, rounded
from versatune_ds.apps.search.jobs import SearchPlan
from versatune_ds.apps.search.page import doubts, search_page, slices
from versatune_ds.apps.search.surface import Array, Surface
from versatune_ds.apps.study.jobs import Job
from versatune_ds.apps.study.run import (
    FINISHED_FILE,
    StudyStopped,
    StudyWorkers,
    data_fingerprint,
    is_finished,
)
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import prepare
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.domain.knowledge import KNOWLEDGE_FORMAT, KNOWLEDGE_VERSION
from versatune_ds.domain.reference import prior_weights
from versatune_ds.engine.faults.signals import StopRequest
from versatune_ds.engine.fingerprints import model_fingerprint
from versatune_ds.engine.prepared import count_steps, planner_settings
from versatune_ds.engine.provenance import changed_settings, describe_hardware, describe_versions
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import DataError, DivergenceError, StateError
from versatune_ds.foundations.files import canonical_hash, read_json_object, require_own, write_json_atomic
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.machine import git_commit
from versatune_ds.report.page import SIGN, to_html, write_html

log = get_logger(__name__)

JOURNAL_FILE, MIXTURE_FILE, PAGE_FILE = "search.json", "mixture.json", "index.html"
JOURNAL_FORMAT = "versatune_ds.search"
Tried = Sequence[tuple[Array, Array]]
"""Mixtures and held-out losses, float64[k] each."""


def search(config: Config, folder: Path) -> Path:
    """Search and write mixture.json and index.html into `folder`; returns the first.

    Raises:
        StudyStopped: it was asked to stop, or other processes have still to do their part.
        VersaTuneError: settings or data that cannot be used, or a run that failed.
    """
    mine = {JOURNAL_FILE: JOURNAL_FORMAT, MIXTURE_FILE: KNOWLEDGE_FORMAT, PAGE_FILE: SIGN}
    require_own(folder, mine, "choose another run.dir")
    exploration = Exploration(config, SearchPlan(config, folder), folder)
    settings, total = exploration.settings, exploration.counts.total
    with (
        StopRequest() as stop,
        StudyWorkers(folder, settings.workers, exploration.origin, total, stop) as workers,
    ):
        found = exploration.run(workers)
    content: dict[str, Any] = {
        "format": KNOWLEDGE_FORMAT,
        "version": KNOWLEDGE_VERSION,
        "domains": exploration.table.by_name(found.shares),
        "search": exploration.describe(found),
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json_atomic(folder / MIXTURE_FILE, content)
    values = content["search"]["objective"]
    log.info(
        "objective: predicted %.4f +- %.4f, measured %.4f; start mixture %.4f",
        values["found"]["predicted"],
        values["found"]["half_width"],
        values["found"]["measured"],
        values["start"]["measured"],
    )
    for doubt in doubts(content["search"]):
        log.warning("%s", doubt)
    page = search_page(content, slices(found.surfaces, found.goal, found.shares))
    write_html(folder / PAGE_FILE, to_html(page, folder), "run.dir")
    return folder / MIXTURE_FILE


class Found(NamedTuple):
    shares: Array
    """float64[k]."""
    limits_kept: bool
    surfaces: list[Surface]
    goal: Goal
    tried: Tried
    """Mixture and held-out losses, float64[k] each."""
    measured: Array
    """float64[k], losses of the run on `shares`."""
    started: Array
    """float64[k], losses of the run on the start mixture."""


class Exploration:
    """One search: what it needs to know, and its rounds.

    Raises:
        ConfigError, DataError, StateError: settings, data or a folder that cannot be used.
    """

    def __init__(self, config: Config, plan: SearchPlan, folder: Path) -> None:
        self.config, self.plan, self.folder = config, plan, folder
        self.settings, self.table = plan.settings, plan.table
        self.objective = config.weights.objective or dict.fromkeys(self.table.names, 1 / len(self.table))
        corpus, planner = self._prepare()
        bounds = Bounds.of(config.domains, corpus, planner, count_steps(config, corpus, planner))
        self.bounds, self.seed = bounds, config.run.seed
        self.prior = prior_weights(config.domains, self.table)
        rounds = self.journal.rounds  # the start is that of the first call, whatever changed since
        self.start = rounds[0][0] if rounds else rounded(bounds.nearest(self.prior))

    def _prepare(self) -> tuple[Corpus, PlannerSettings]:
        """Data, budget and journal."""
        config, settings, names = self.config, self.settings, self.table.names
        any_run = self.plan.any_run().config
        prepared = prepare(any_run)
        log.info("%s", prepared.table())
        for split, caches in prepared.caches.items():
            lacking = [name for name, cache in zip(names, caches, strict=True) if cache is None]
            if lacking:
                raise DataError(
                    f"no data for {', '.join(lacking)} in data.{split}: every domain is trained on and "
                    "evaluated; add a source, or leave the domain out of domains.names"
                )
        limit = config.evaluation.max_samples_per_domain
        held_out = [cache.lengths[:limit] for cache in prepared.caches["eval"] if cache is not None]
        self.held_out_tokens = sum(int(lengths.sum()) for lengths in held_out)
        self.counts = count(
            settings.way, settings.budget_tokens, len(names), self.plan.run_tokens, self.held_out_tokens
        )
        log.info(
            "%s: %d runs and %d mixtures, at most %.3g tokens",
            settings.way,
            self.counts.total - (settings.way == "adapters") * self.counts.points,
            self.counts.points,
            self.counts.tokens,
        )
        made_of = {"data": data_fingerprint(prepared), "model": model_fingerprint(any_run.model)}
        self.origin = canonical_hash(made_of)
        self.journal = SearchJournal(self.folder, {**self.plan.settings_that_matter(), "contents": made_of})
        return Corpus.from_caches(prepared.caches["train"], names), planner_settings(config, self.table)

    def run(self, workers: StudyWorkers) -> Found:
        """All rounds, and the runs that check what was found."""
        self.journal.write()
        singles = [self.plan.single(i) for i in range(self.counts.singles)]
        start = self._check("start", self.start)
        waiting = [start, *singles]
        if singles:  # what follows is merged from them
            self._finish(workers, waiting)
            waiting = []
        points, jobs = [*np.eye(len(self.table))[: len(singles)]], list(singles)
        for number in itertools.count():
            done = len(jobs) - len(singles)
            if done >= self.counts.points:
                break
            if number == len(self.journal.rounds):
                self.journal.add(self._choose(points, jobs, start))
            new = self.journal.rounds[number]
            jobs += [self._trial(done + i, point) for i, point in enumerate(new)]
            points += new
            self._finish(workers, [*waiting, *jobs[-len(new) :]])
            waiting = []
        goal, tried = self._known(points, jobs, start)
        surfaces = fit(tried, goal.base)
        shares, limits_kept = choice.best(surfaces, goal, self._centres, self.bounds.nearest, self.seed)
        check = self._check("found", shares)
        self._finish(workers, [check])
        return Found(shares, limits_kept, surfaces, goal, tried, self._losses(check), self._losses(start))

    def _known(self, points: Sequence[Array], jobs: Sequence[Job], start: Job) -> tuple[Goal, Tried]:
        """The goal and what was tried, of finished jobs.

        Merged adapters are no runs: their losses are scaled so that at the start mixture, which is the
        first one merged, they are those of the run on it.
        """
        goal = Goal.of(self.table.names, self.objective, self.settings.limits, self._losses(start, line=0))
        losses = [self._losses(job) for job in jobs]
        singles = self.counts.singles
        factor = self._losses(start) / losses[singles] if singles else 1.0
        return goal, [(point, factor * loss) for point, loss in zip(points, losses, strict=True)]

    @property
    def _centres(self) -> list[Array]:
        return [self.prior, np.full(len(self.table), 1 / len(self.table))]

    def _choose(self, points: Sequence[Array], jobs: Sequence[Job], start: Job) -> list[Array]:
        done = len(jobs) - self.counts.singles
        size, bounded = round_size(done, self.counts.points, self.settings.rounds), self.bounds.nearest
        if not done:
            return first_points(self.prior, size, bounded, self.seed)
        goal, tried = self._known(points, jobs, start)
        surfaces, seed = fit(tried, goal.base), self.seed + done
        return choice.next_points(surfaces, goal, self._centres, size, bounded, seed)

    def _trial(self, number: int, shares: Array) -> Job:
        """What tries a mixture; runs have an order of samples each, so that they scatter as runs do."""
        name = f"point-{number:03d}"
        if self.counts.singles:
            return self.plan.merged(name, shares)
        return self.plan.proxy(name, shares, self.seed + 1 + number)

    def _check(self, name: str, shares: Array) -> Job:
        """A run that the surface does not know; on the start and on the mixture found with one seed."""
        return self.plan.proxy(f"{name}-{canonical_hash(shares.tolist())[:8]}", shares, self.seed)

    def _finish(self, workers: StudyWorkers, jobs: Sequence[Job]) -> None:
        """Have the jobs done, our part by the workers; StudyStopped where others have still to do theirs."""
        index, parts = self.settings.share
        workers.finish(jobs[index::parts])
        missing = [job.name for job in jobs if not is_finished(job, job.fingerprint(self.origin))]
        if missing:
            raise StudyStopped(
                f"part {self.settings.part} of this round is done; of the others {len(missing)} runs are not "
                f"({missing[0]} ...): start every part again when all have ended"
            )

    def _losses(self, job: Job, line: int = -1) -> Array:
        """float64[k]: held-out losses of a finished job; line 0: before its first step.

        Raises:
            DivergenceError: one is not finite.
        """
        lines = (job.config.run.dir / constants.EVAL_FILE).read_text(encoding="utf-8").splitlines()
        losses = json.loads(lines[line])["domain_loss"]
        if None in losses.values():
            raise DivergenceError(f"run {job.name}: a held-out loss is not finite; lower search.lr")
        return self.table.vector(losses, "held-out losses")

    def describe(self, found: Found) -> dict[str, Any]:
        by_name, goal = self.table.by_name, found.goal
        here, start = (choice.predict(found.surfaces, goal, p[None]) for p in (found.shares, self.start))
        losses = {
            name: {
                "base": float(goal.base[i]),
                "predicted": float(here.loss[0, i]),
                "interval_95": [float(here.low[0, i]), float(here.high[0, i])],
                "measured": float(found.measured[i]),
                "start_measured": float(found.started[i]),
                "limit": self.settings.limits.get(name),
                "left_out_rms": float(np.sqrt(np.mean(found.surfaces[i].left_out() ** 2))),
                "spread": float(found.surfaces[i].values.std(ddof=1)),
            }
            for i, name in enumerate(self.table.names)
        }
        return {
            "settings": self.settings.model_dump(mode="json"),
            "weight_unit": self.config.domains.weight_unit,
            "start": by_name(self.start),
            "passes": by_name(self.bounds.passes(found.shares)),
            "losses": losses,
            "objective": {
                "weights": by_name(goal.objective),
                "base": float(goal.value(goal.base)),
                "start": describe_objective(start, goal, found.started),
                "found": describe_objective(here, goal, found.measured),
            },
            "limits_kept": found.limits_kept,
            "tried": [
                {"shares": by_name(point), "loss": by_name(loss), "objective": float(goal.value(loss))}
                for point, loss in found.tried
            ],
            "cost": self._cost(),
            "hardware": describe_hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "versions": describe_versions(),
            "commit": git_commit(),
        }

    def _cost(self) -> dict[str, Any]:
        """Of all finished runs in the folder, also those that the last call found there."""
        done = sorted(self.folder.glob(f"runs/*/{FINISHED_FILE}"))
        metrics = [path.with_name(constants.METRICS_FILE) for path in done]
        trained = [path for path in metrics if path.is_file()]
        lines = [json.loads(line) for path in trained for line in path.read_text().splitlines()]
        evaluations = len(done) + len(trained)  # a run is evaluated before its first step, too
        return {
            "runs": len(trained),
            "merged": len(done) - len(trained),
            "tokens": sum(line["real_tokens"] for line in lines),
            "held_out_tokens": evaluations * self.held_out_tokens,
            "seconds": sum(json.loads(path.read_text())["seconds"] for path in done),
        }


class SearchJournal:
    """search.json: what the runs of a search are made with, and the mixtures of its rounds.

    Args:
        settings: what decides the results of its runs.

    Raises:
        StateError: the folder holds a search with other ones.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / JOURNAL_FILE
        self._settings = json.loads(json.dumps(settings))
        known = read_json_object(self._path)
        if known and (changed := changed_settings(known["made_with"], self._settings)):
            names = ", ".join(name for name, _, _ in changed[:5])
            raise StateError(
                f"{folder} holds a search with other settings: {names}. Its runs say "
                "nothing of these; choose another run.dir, or remove the folder"
            )
        self.rounds = [[np.array(point) for point in points] for points in known.get("rounds", [])]

    def add(self, points: Sequence[Array]) -> None:
        """Write down a round before its first run."""
        self.rounds.append(list(points))
        self.write()

    def write(self) -> None:
        """Write the file, also before the first run of all."""
        content = {
            "format": JOURNAL_FORMAT,
            "version": 1,
            "made_with": self._settings,
            "rounds": [[point.tolist() for point in each] for each in self.rounds],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self._path, content)


def fit(tried: Tried, base: Array) -> list[Surface]:
    """A surface a domain through the logarithms of its losses over those before training."""
    points, losses = (np.stack(parts) for parts in zip(*tried, strict=True))
    values = np.log(losses / base)
    return [Surface.fit(points, values[:, i], i) for i in range(len(base))]


def describe_objective(prediction: choice.Prediction, goal: Goal, measured: Array) -> dict[str, float]:
    return {
        "predicted": float(prediction.objective[0]),
        "half_width": float(prediction.half_width[0]),
        "measured": float(goal.value(measured)),
    }
