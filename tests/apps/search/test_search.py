"""A whole search: its rounds, going on after a kill, shares of several processes, and what it writes.

Runs are played by a law, log(l / b) = -0.2 sqrt(share), but for those of the slow tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import REPOSITORY
from small_runs import SMALL_MODEL, sample_settings

from versatune_ds.apps.search import choice
from versatune_ds.apps.search import run as search_run
from versatune_ds.apps.search.jobs import MergedJob, SearchPlan
from versatune_ds.apps.search.page import doubts
from versatune_ds.apps.study.run import StudyStopped
from versatune_ds.config.load import load_config
from versatune_ds.config.schema import Config
from versatune_ds.domain.reference import prior_weights
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, StateError

NAMES = ["law", "medicine", "finance", "science", "code", "other"]
BASE = np.array([4.0, 3.0, 3.0, 2.0, 1.0, 3.0])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Settings of a search on the sample, and a pretrained model of 90 thousand random parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("search")
    raw = sample_settings(folder)
    model = folder / "sample" / "model"
    shape = {**json.loads((model / "config.json").read_text()), **SMALL_MODEL}
    (model / "config.json").write_text(json.dumps(shape))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(folder / "base")
    raw["model"] |= {"source": str(folder / "base"), "tokenizer": str(model), "weights": "pretrained"}
    raw["weights"] = {"strategy": "constant"}
    raw["evaluation"] = {"max_samples_per_domain": 4}
    raw["deepspeed"] = {"zero_optimization": {"stage": 0}}
    raw["search"] = {"budget_tokens": 40_000, "steps": 2, "packs_per_step": 1, "workers": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture
def settings(prepared, tmp_path, monkeypatch):
    """Settings with a run folder of their own, and workers that play runs; `played` names the runs."""
    played: list[str] = []

    class Players:
        stop_after = 10**6

        def __init__(self, folder, workers, origin, total, stop):
            self.origin, self.folder = origin, folder

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def finish(self, jobs):
            assert (self.folder / "search.json").is_file()  # before the first run
            for job in jobs:
                if search_run.is_finished(job, job.fingerprint(self.origin)):
                    continue
                if len(played) >= Players.stop_after:
                    raise StudyStopped("stopped")
                played.append(job.name)
                play(job, job.fingerprint(self.origin))

    monkeypatch.setattr(search_run, "StudyWorkers", Players)
    monkeypatch.setattr(choice, "NUM_CANDIDATES", 100)

    def load(*overrides: str) -> Config:
        return load_config(prepared / "config.yaml", [f"run.dir={tmp_path / 'run'}", *overrides])

    load.played, load.players, load.folder = played, Players, tmp_path / "run" / "search"
    return load


def play(job, fingerprint: str) -> None:
    """What a run leaves."""
    folder = job.config.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    share = np.array([job.config.domains.initial[name] for name in NAMES])
    after = dict(zip(NAMES, (BASE * np.exp(-0.2 * np.sqrt(share))).tolist(), strict=True))
    lines = [{"step": 2, "domain_loss": after}]
    if isinstance(job, MergedJob):
        lines[0]["domain_loss"] = {name: 1.1 * loss for name, loss in after.items()}
    else:
        lines.insert(0, {"step": 0, "domain_loss": dict(zip(NAMES, BASE.tolist(), strict=True))})
        (folder / "metrics.jsonl").write_text('{"real_tokens": 250}\n' * 2)
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "finished.json").write_text(
        json.dumps({"fingerprint": fingerprint, "seconds": 2.0, "seed": job.config.run.seed})
    )


def found_seed(folder: Path, name: str) -> int:
    """Seed of a played run."""
    return int(content(folder / "runs" / name / "finished.json")["seed"])


def content(path: Path) -> dict:
    return json.loads(path.read_text())


def test_proxies_find_the_mixture_of_the_law_and_domains_initial_takes_it(settings):
    config = settings("search.budget_tokens=60000")
    path = search_run.search(config, settings.folder)
    found = content(path)
    points = [name for name in settings.played if name.startswith("point-")]
    seeds = [found_seed(settings.folder, name) for name in settings.played]
    assert seeds[0] == seeds[-1] == 5 and sorted(seeds[1:-1]) == list(range(6, 6 + len(points)))
    assert points == [f"point-{i:03d}" for i in range(len(points))]
    assert settings.played[-1].startswith("found-")
    rounds = content(settings.folder / "search.json")["rounds"]
    assert len(rounds) == 4 and sum(map(len, rounds)) == len(points) == len(found["search"]["tried"])
    # the lowest sum of b exp(-0.2 sqrt(w)): sqrt(w) about in proportion to b
    wanted = BASE**2 / (BASE**2).sum()
    shares = np.array([found["domains"][name] for name in NAMES])
    np.testing.assert_allclose(shares, wanted, atol=0.06)
    objective = found["search"]["objective"]
    assert objective["found"]["measured"] < min(t["objective"] for t in found["search"]["tried"]) + 1e-3
    assert objective["found"]["measured"] < objective["start"]["measured"]
    for name, base in zip(NAMES, BASE, strict=True):
        loss = found["search"]["losses"][name]
        low, high = loss["interval_95"]
        assert loss["base"] == base and low <= loss["predicted"] <= high
        assert loss["predicted"] == pytest.approx(loss["measured"], rel=0.01)
    cost = found["search"]["cost"]
    assert cost["runs"] == len(settings.played) and cost["merged"] == 0
    assert cost["tokens"] == 500 * len(settings.played) and cost["seconds"] == 2 * len(settings.played)
    used = settings(f"domains.initial={path}")
    np.testing.assert_allclose(prior_weights(used.domains, DomainTable(NAMES)), shares, atol=1e-9)
    page = (settings.folder / "index.html").read_text()
    assert "Doubts" not in page
    assert page.count('<svg role="img"') == 4 and 'aria-label="shares of the mixture"' in page


def test_adapters_train_one_run_a_domain_and_two_that_check(settings):
    search_run.search(settings("search.way=adapters", "search.budget_tokens=20000"), settings.folder)
    singles, points = settings.played[1:7], settings.played[7:-1]
    assert singles == [f"adapter-{name}" for name in NAMES]
    assert len(points) >= 9 and all(name.startswith("point-") for name in points)
    assert settings.played[0].startswith("start-") and settings.played[-1].startswith("found-")
    found = content(settings.folder / "mixture.json")["search"]
    assert found["cost"]["merged"] == len(points) and found["cost"]["runs"] == 8
    corners = [tried["shares"] for tried in found["tried"][:6]]
    assert corners == [{name: float(name == alone) for name in NAMES} for alone in NAMES]
    # of merged adapters the law is off by 10 %, of runs it is not: what is said holds for runs
    assert found["losses"]["law"]["predicted"] == pytest.approx(found["losses"]["law"]["measured"], rel=0.01)
    assert found["tried"][6]["objective"] == pytest.approx(found["objective"]["start"]["measured"])


def test_the_parts_of_a_merged_mixture_are_the_domains_adapters(settings):
    plan = SearchPlan(settings("search.way=adapters", "model.adapter={rank: 4, alpha: 8}"), settings.folder)
    shares = np.array([0.5, 0.3, 0.2, 0.0, 0.0, 0.0])
    adapter = plan.merged("m", shares).config.model.adapter
    parts = {Path(folder).parts[-2]: factor for folder, factor in adapter.start_from.items()}
    assert parts == {"adapter-law": 0.5, "adapter-medicine": 0.3, "adapter-finance": 0.2}
    assert (adapter.rank, adapter.alpha) == (12, 24)
    single = plan.single(0).config
    assert single.checkpoint.export_at_end and single.domains.initial == {n: float(n == "law") for n in NAMES}
    proxy = plan.proxy("p", shares, seed=7)
    assert not proxy.config.checkpoint.export_at_end and proxy.seed == proxy.config.run.seed == 7
    # a rate for adapters where the run trains all of the model
    assert single.optimizer.lr == settings().optimizer.lr
    assert SearchPlan(settings("search.way=adapters"), settings.folder).single(0).config.optimizer.lr == (
        pytest.approx(10 * settings().optimizer.lr)
    )


def test_a_killed_search_goes_on_with_the_mixtures_it_had_chosen(settings):
    settings.players.stop_after = 7
    with pytest.raises(StudyStopped):
        search_run.search(settings(), settings.folder)
    assert not (settings.folder / "mixture.json").exists()
    settings.players.stop_after = 10**6
    whole = content(search_run.search(settings(), settings.folder))
    assert len(set(settings.played)) == len(settings.played)  # none twice
    again = content(search_run.search(settings(), settings.folder))
    assert again["domains"] == whole["domains"] and len(set(settings.played)) == len(settings.played)


def test_other_settings_are_refused_and_another_goal_is_answered_from_the_same_runs(settings):
    before = content(search_run.search(settings(), settings.folder))
    count = len(settings.played)
    with pytest.raises(StateError, match=r"other settings: optimizer\.lr, train\.max_steps\. Its runs"):
        search_run.search(settings("optimizer.lr=1e-4", "search.steps=3"), settings.folder)
    objective = {name: 0.95 if name == "code" else 0.01 for name in NAMES}
    after = content(
        search_run.search(settings(f"weights.objective={json.dumps(objective)}"), settings.folder)
    )
    assert after["domains"]["code"] > before["domains"]["code"] + 0.2
    assert len(settings.played) == count + 1  # its check
    assert after["search"]["objective"]["weights"]["code"] == 0.95


def test_limits_and_bounds_decide_what_is_taken(settings):
    free = content(search_run.search(settings(), settings.folder))
    assert free["domains"]["code"] < 0.08 and free["search"]["limits_kept"]
    # code must fall by 8 %: exp(-0.2 sqrt(w)) = 0.92 at w = 0.17
    limited = content(search_run.search(settings("search.limits={code: -0.08}"), settings.folder))
    assert limited["domains"]["code"] >= 0.16 and limited["search"]["limits_kept"]
    assert limited["search"]["losses"]["code"]["interval_95"][1] <= 0.92 * (1 + 1e-9)
    never = content(search_run.search(settings("search.limits={code: -0.9}"), settings.folder))
    assert not never["search"]["limits_kept"]
    assert "oversteps them least" in (settings.folder / "index.html").read_text()
    capped = content(search_run.search(settings("domains.max_weight=0.25"), settings.folder))
    assert capped["search"]["start"] == free["search"]["start"]
    assert max(capped["domains"].values()) <= 0.25


def test_parts_share_the_runs_of_a_round(settings):
    with pytest.raises(StudyStopped, match=r"part 0/2 of this round is done; of the others \d+ runs are not"):
        search_run.search(settings("search.part=0/2", "search.rounds=1"), settings.folder)
    first = list(settings.played)
    assert first[0].startswith("start-") and first[1:] == [
        f"point-{2 * i + 1:03d}" for i in range(len(first) - 1)
    ]
    for calls in range(20):
        if (settings.folder / "mixture.json").exists():
            break
        with contextlib.suppress(StudyStopped):
            search_run.search(
                settings(f"search.part={(calls + 1) % 2}/2", "search.rounds=1"), settings.folder
            )
    assert calls == 2  # the one that finds a round whole goes on with its part of the next
    assert len(set(settings.played)) == len(settings.played)


def test_a_mixture_whose_check_is_no_better_than_the_start_is_doubted(settings):
    """From the best mixture nothing better is found."""
    best = dict(zip(NAMES, (BASE**2 / (BASE**2).sum()).tolist(), strict=True))
    found = content(search_run.search(settings(f"domains.initial={json.dumps(best)}"), settings.folder))
    measured = {key: found["search"]["objective"][key]["measured"] for key in ("found", "start")}
    assert ("did no better" in (settings.folder / "index.html").read_text()) == (
        measured["found"] >= measured["start"]
    )
    worse = {**found["search"], "objective": {"found": {"measured": 2.0}, "start": {"measured": 2.0}}}
    assert len(doubts(worse)) == 1 and "keep the start" in doubts(worse)[0]
    assert len(doubts({**worse, "limits_kept": False})) == 2


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["search=null"], "section search is missing"),
        (["search.budget_tokens=100"], r"budget_tokens 100 is too little for proxies: 2 runs of 512 tokens"),
        (["search.limits={maths: 0.1}"], r"search\.limits: unknown domains \['maths'\]"),
        (["search.limits={code: -1}"], "code would need a loss below 0"),
        (["search.part=2/2"], "part 2/2: the first of 2 is 0, the last one 1"),
        (["search.way=adapters", "model.weights=random"], "random has nothing to stand beside"),
        (["search.way=adapters", "model.adapter={kind: dora}"], "no dora"),
        (["domains.max_epochs=0.2"], r"the data lasts for .* steps under domains\.max_epochs"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_first_run(settings, overrides, text):
    with pytest.raises(ConfigError, match=text):
        search_run.search(settings(*overrides), settings.folder)
    assert not settings.played


def test_a_search_does_not_replace_what_it_did_not_write(settings):
    settings.folder.mkdir(parents=True)
    (settings.folder / "index.html").write_text("mine")
    with pytest.raises(StateError, match=r"holds index\.html, which this program did not write"):
        search_run.search(settings(), settings.folder)


MERGED = """
import sys
import numpy as np
from pathlib import Path
from versatune_ds.apps.search.jobs import SearchPlan
from versatune_ds.config.load import load_config
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
job = SearchPlan(load_config(sys.argv[1], sys.argv[3:]), Path(sys.argv[2])).merged("alone", np.eye(6)[0])
job.config.run.dir.mkdir()
job.perform(start_process_group())
close_process_group()
"""


def python(*arguments: str) -> str:
    """Run Python; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("way", ["proxies", "adapters"])
def test_a_search_from_the_command_line_and_a_run_with_its_mixture(prepared, tmp_path, way):
    file, folder = str(prepared / "config.yaml"), tmp_path / "run" / "search"
    main, overrides = ["-m", "versatune_ds.cli.main"], [f"run.dir={tmp_path / 'run'}", f"search.way={way}"]
    budget = ["search.budget_tokens=20000", "search.rounds=1"]
    said = python(*main, "search", "--config", file, *overrides, *budget)
    assert f"use it: domains.initial={folder / 'mixture.json'} weights.strategy=constant" in said
    found = content(folder / "mixture.json")["search"]
    assert all(0 < loss["measured"] < 1.1 * loss["base"] for loss in found["losses"].values())
    assert (found["cost"]["merged"] > 0) == (way == "adapters")
    if way == "adapters":  # that of the first domain alone, factor 1, is the model of the run that trained it
        python("-c", MERGED, file, str(folder), *overrides)
        merged, trained = (
            json.loads((folder / "runs" / name / "eval.jsonl").read_text().splitlines()[-1])["domain_loss"]
            for name in ("alone", "adapter-law")
        )
        assert merged == pytest.approx(trained, rel=1e-5)
        assert merged["law"] != pytest.approx(found["losses"]["law"]["base"], rel=1e-4)
    mixture = f"domains.initial={folder / 'mixture.json'}"
    python(*main, "train", "--config", file, *overrides, mixture, "train.max_steps=1")
