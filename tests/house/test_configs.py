"""Every shipped configuration is valid, says what it is for, and names commands that exist."""

from __future__ import annotations

import json

import pytest
from launching import REPOSITORY

from versatune_ds.config.load import load_config
from versatune_ds.config.study import load_study
from versatune_ds.domain.reference import prior_weights
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.deepspeed_config import deepspeed_config
from versatune_ds.engine.study_jobs import StudyPlan

STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
# files of benchmark tasks are no run's settings: tests/config/test_benchmarks.py
TASKS = sorted((REPOSITORY / "configs" / "benchmarks").glob("*.yaml"))
CONFIGS = sorted(set((REPOSITORY / "configs").rglob("*.yaml")) - set(STUDIES) - set(TASKS))
# Counts of judged generations per domain (law, medicine, finance, science, code, other); VersaTune, phase 1.
COUNTS = {
    "llama-2-7b": (571, 866, 653, 595, 813, 6489),
    "llama-2-13b": (563, 784, 664, 608, 951, 6414),
    "llama-3-8b": (194, 648, 289, 748, 5552, 2558),
    "qwen2-7b": (855, 669, 347, 862, 3327, 1998),
    "qwen2.5-7b": (299, 490, 357, 738, 5006, 1968),
    "qwen2.5-14b": (195, 354, 358, 874, 5542, 1504),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_valid_and_introduces_itself(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = load_config(path)
    opening = path.read_text(encoding="utf-8").split("\nrun:")[0]
    for word in ("# What:", "# Hardware:", "# Command:"):
        assert word in opening
    if path.stem != "quickstart":
        assert str(path.relative_to(REPOSITORY)) in opening
    world_size = 2 if "strategies" in path.parts or path.stem == "quickstart" else 8
    deepspeed_config(config, world_size)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_run_of_a_study_is_valid(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = StudyPlan(load_study(path), REPOSITORY, REPOSITORY)
    assert plan.check() > len(plan.study.arms) * len(plan.study.seeds)
    opening = path.read_text(encoding="utf-8").split("\ndir:")[0]
    for word in ("# What:", "# Hardware:", "# Command:", str(path.relative_to(REPOSITORY))):
        assert word in opening


@pytest.mark.parametrize("name", COUNTS)
def test_initial_weights_are_the_detected_distribution(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    weights = prior_weights(config.domains, DomainTable(config.domains.names))
    total = sum(COUNTS[name])
    assert config.domains.names == ["law", "medicine", "finance", "science", "code", "other"]
    assert weights == pytest.approx([count / total for count in COUNTS[name]], abs=2e-4)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json")), ids=lambda p: p.stem
)
def test_deepspeed_files_are_zero3(path):
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == 3
