"""Every shipped configuration is valid, says what it is for, and names commands that exist."""

from __future__ import annotations

import json
import re

import pytest
from launching import REPOSITORY

from versatune_ds.apps.plan.setup import GIB
from versatune_ds.apps.study.config import load_study
from versatune_ds.apps.study.jobs import StudyPlan
from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config
from versatune_ds.domain.reference import prior_weights
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config

STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
# files of benchmark tasks are no run's settings: tests/config/test_benchmarks.py
TASKS = sorted((REPOSITORY / "configs" / "benchmarks").glob("*.yaml"))
CONFIGS = sorted(set((REPOSITORY / "configs").rglob("*.yaml")) - set(STUDIES) - set(TASKS))
SAMPLES = ("quickstart", "smollm2")  # on the shipped sample, for CPUs
MODELS = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if path.stem not in SAMPLES)
# Counts of judged generations per domain (law, medicine, finance, science, code, other); VersaTune, phase 1.
COUNTS = {
    "llama-2-7b": (571, 866, 653, 595, 813, 6489),
    "llama-2-13b": (563, 784, 664, 608, 951, 6414),
    "llama-3-8b": (194, 648, 289, 748, 5552, 2558),
    "qwen2-7b": (855, 669, 347, 862, 3327, 1998),
    "qwen2.5-7b": (299, 490, 357, 738, 5006, 1968),
    "qwen2.5-14b": (195, 354, 358, 874, 5542, 1504),
    "qwen2.5-32b": (
        5.5,
        8.4,
        5.2,
        21.7,
        28.5,
        30.7,
    ),  # per cent, read off the bar chart: no counts are published
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
    is_small = {"strategies", "searches"} & set(path.parts) or path.stem in SAMPLES
    world_size = 2 if is_small else 8
    deepspeed_config(config, world_size)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_the_memory_in_the_heading_is_what_plan_says_of_that_hardware(path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    opening = " ".join(
        line.lstrip("# ") for line in path.read_text(encoding="utf-8").split("\nrun:")[0].splitlines()
    )
    hardware = re.search(r"Hardware: (?:one node|(\d+) nodes) with (\d+) x (\d+) GB", opening)
    memory = re.search(
        r"`versatune-ds (plan [^`]+)`.*: ([\d.]+) GiB always held, ([\d.]+) GiB at the peak", opening
    )
    assert hardware and memory
    command = memory[1].split()
    assert str(path.relative_to(REPOSITORY)) in command
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["verdict"] == "fits"
    assert plan["settings"]["gpus"] == int(hardware[1] or 1) * int(hardware[2])
    assert plan["gpu_memory_bytes"] == int(hardware[3]) * 10**9
    always = sum(part["bytes"] for part in plan["memory"]["always"])
    found = [f"{size / GIB:.1f}" for size in (always, plan["memory"]["peak_bytes"])]
    assert [memory[2], memory[3]] == found


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
