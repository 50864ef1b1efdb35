"""From a study's settings to its runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
from launching import REPOSITORY

from versatune_ds.apps.study.config import load_study
from versatune_ds.apps.study.jobs import StudyPlan, merge
from versatune_ds.domain.knowledge import KNOWLEDGE_FORMAT, KNOWLEDGE_VERSION
from versatune_ds.foundations.errors import ConfigError

STUDIES = REPOSITORY / "configs" / "studies"
REFERENCE = dict.fromkeys(["law", "medicine", "finance", "science", "code", "other"], 2.0)


def plan_of(name: str = "strategies", *overrides: str) -> StudyPlan:
    return StudyPlan(load_study(STUDIES / f"{name}.yaml", list(overrides)), Path("/corpus"), Path("/model"))


def test_layers_replace_keys_and_do_not_mix_mappings_by_domain():
    first = {"domains": {"initial": {"law": 0.5, "code": 0.5}, "min_weight": 0.1}, "deepspeed": "a.json"}
    second = {"domains": {"initial": {"law": 1.0}}, "deepspeed": {"x": 1}}
    assert merge([first, second]) == {
        "domains": {"initial": {"law": 1.0}, "min_weight": 0.1},
        "deepspeed": {"x": 1},
    }
    assert first["domains"]["initial"] == {"law": 0.5, "code": 0.5}


def test_every_arm_runs_with_every_seed_on_the_same_budget():
    plan = plan_of()
    jobs = plan.arms(REFERENCE)
    study = plan.study
    assert {(job.arm, job.seed) for job in jobs} == {(a, s) for a in study.arms for s in study.seeds}
    assert len({job.name for job in jobs}) == len(jobs) == 65
    assert len({(job.config.batch, job.config.train, job.config.optimizer) for job in jobs}) == 1
    assert {job.config.run.seed for job in jobs} == set(study.seeds)
    assert all(str(job.config.model.source).endswith("runs/base/model") for job in jobs)
    assert all(job.config.model.weights == "pretrained" for job in jobs)
    assert all(job.config.weights.reference == REFERENCE for job in jobs)
    assert jobs[0].config.data.train[0].path == "/corpus/train/law.jsonl"


@pytest.mark.parametrize("name", ["smollm2", "epochs"])
def test_the_corpus_is_filled_in_wherever_it_is_named(name):
    """Also in an arm of its own data, and in those of the pre-training."""
    plan = plan_of(name)
    jobs = [*plan.base(), *plan.references(), *plan.arms(REFERENCE)]
    paths = {source.path for job in jobs for source in (*job.config.data.train, *job.config.data.eval)}
    assert "/corpus/train/law.jsonl" in paths and not [path for path in paths if "{" in path]


def test_fine_tuning_starts_from_the_mixture_of_the_base_unless_an_arm_says_otherwise():
    jobs = {job.arm: job.config for job in plan_of().arms(REFERENCE)}
    mixture = plan_of().study.pretraining.mixture
    assert plan_of().base()[0].config.domains.initial == mixture
    assert jobs["fostering_linear"].domains.initial == jobs["constant"].domains.initial == mixture
    assert jobs["law_only"].domains.initial["law"] == 1.0
    assert jobs["law_expansion"].weights.target == "law"


def test_an_adapter_is_trained_by_all_but_the_base():
    plan = plan_of("strategies", "model.adapter={rank: 4}")
    tuned = [*plan.references(), *plan.arms(REFERENCE)]
    assert {job.config.model.adapter.rank for job in tuned} == {4}
    assert plan.base()[0].config.model.adapter is None


def test_a_pretrained_model_is_trained_by_all_and_made_by_none(tmp_path):
    seen = tmp_path / "knowledge.json"
    shares = dict(zip(REFERENCE, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], strict=True))
    knowledge = {"format": KNOWLEDGE_FORMAT, "version": KNOWLEDGE_VERSION, "domains": shares}
    seen.write_text(json.dumps(knowledge))
    study = load_study(
        STUDIES / "strategies.yaml",
        ["pretraining=null", "model={source: /real, adapter: {rank: 4}}", f"mixture={seen}"],
    )
    plan = StudyPlan(study, Path("/corpus"), "/real")
    assert plan.base() == []
    jobs = {job.arm: job.config for job in plan.arms(REFERENCE)}
    assert {config.model.source for config in jobs.values()} == {"/real"}
    assert jobs["constant"].domains.initial == shares
    assert jobs["law_only"].domains.initial["law"] == 1.0
    before = plan.arms(REFERENCE)[0].fingerprint("")
    seen.write_text(
        json.dumps({**knowledge, "domains": dict(zip(REFERENCE, [1, 0, 0, 0, 0, 0], strict=True))})
    )
    assert StudyPlan(study, Path("/corpus"), "/real").arms(REFERENCE)[0].fingerprint("") != before


def test_reference_runs_see_one_domain_and_are_evaluated_on_the_way():
    jobs = plan_of().references()
    assert [job.arm for job in jobs] == list(REFERENCE)
    for job in jobs:
        assert job.config.domains.initial == {name: float(name == job.arm) for name in REFERENCE}
        assert job.config.evaluation.every_n_steps == 16 and job.total_steps == 32


def test_all_runs_are_counted_and_checked_before_the_first():
    assert plan_of().check() == 1 + 6 + 65
    with pytest.raises(ConfigError, match=r"run inverse_seed-11.*\n.*weights.strategy"):
        plan_of("strategies", "arms.inverse.weights.strategy=invers").check()
    with pytest.raises(ConfigError, match="'math' is no domain"):
        plan_of("strategies", "expansions=[{target: math, arms: [law_only]}]").check()
    with pytest.raises(ConfigError, match="max_steps is needed"):
        plan_of("strategies", "settings.train={epochs: 1}").check()


def test_the_study_for_a_gpu_is_a_valid_line_of_overrides():
    text = (REPOSITORY / "docs" / "study.md").read_text(encoding="utf-8")
    (line,) = re.findall(
        r"^versatune-ds (study [^`]+dir=runs/studies/strategies_gpu.*?)^```", text, re.M | re.S
    )
    _, _, path, *overrides = shlex.split(line.replace("\\\n", " "))
    plan = StudyPlan(load_study(REPOSITORY / path, overrides), Path("/corpus"), Path("/model"))
    assert plan.check() == 1 + 6 + 65
    config = plan.arms(REFERENCE)[0].config
    assert (config.batch.pack_len, config.train.max_steps, config.model.dtype) == (2048, 80, "bf16")
    assert config.evaluation.max_samples_per_domain is None and config.evaluation.every_n_steps == 80


@pytest.mark.parametrize("setting", ["run.seed=3", "model.dtype=bf16", "weights.reference={law: 1}"])
def test_settings_of_the_study_itself_are_refused_in_settings(setting):
    with pytest.raises(ConfigError, match="is filled in by the study; remove it"):
        plan_of("strategies", f"settings.{setting}")


def test_a_run_is_told_by_everything_that_decides_its_result():
    def prints(*overrides: str, origin: str = "data") -> set[str]:
        return {job.fingerprint(origin) for job in plan_of("quick", *overrides).arms(REFERENCE)}

    same, study = prints(), load_study(STUDIES / "quick.yaml")
    assert len(same) == len(study.arms)
    assert prints() == same
    assert not prints(origin="other data") & same
    assert not prints("settings.optimizer.lr=0.5") & same
    assert len(prints("arms.fostering_linear.weights.sigma=2") & same) == len(same) - 1
