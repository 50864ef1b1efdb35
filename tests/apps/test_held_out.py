"""Reference losses and evaluations with real models on one and two ranks.

One training with early stopping, one measurement of reference losses that is stopped and gone on with, and
evaluations of what they leave.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launching import REPOSITORY, case_file, launch, launch_soundly, read_jsonl
from small_runs import prepare_run, sample_settings
from transformers import AutoConfig, AutoModelForCausalLM

from versatune_ds.config.load import load_config
from versatune_ds.domain.evaluation import ModelEvaluation
from versatune_ds.domain.table import DomainTable

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "tests" / "support" / "measure_cases.py"
DOMAINS = ["law", "medicine", "code"]
SHARED = ("batch.sequence_parallel=2", "evaluation.generate=null")
ASKED = {"samples": 3, "max_new_tokens": 24, "batch_size": 2}
TABLE = DomainTable(DOMAINS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three prepared domains of the sample; at this learning rate a tiny model overfits in a few steps."""
    folder = tmp_path_factory.mktemp("measure")
    raw = sample_settings(folder)
    for split in ("train", "eval"):
        raw["data"][split] = [s for s in raw["data"][split] if s["domain"] in DOMAINS]
    raw["domains"]["names"] = DOMAINS
    raw["batch"] = {"pack_len": 256, "packs_per_step": 2}
    raw["weights"] = {"strategy": "constant"}
    raw["optimizer"] |= {"lr": 3e-2, "schedule": "constant"}
    raw["train"] = {"max_steps": 100}
    raw["evaluation"] = {"every_n_steps": 4, "patience": 2, "select": "overall", "generate": ASKED}
    raw["checkpoint"] = {"every_n_steps": 10, "keep_last": 1}
    raw["reference"] = {"lr": 5e-3, "max_epochs": 2, "patience": 2}
    prepare_run(folder, raw)
    return folder


def case(folder: Path, what: str, name: str, *overrides: str, **more) -> dict:
    """A case for measure_cases.py with its own folder."""
    config, out = str(folder / "config.yaml"), folder / name
    run = [f"run.dir={out if what == 'train' else folder / 'trained'}"]
    return {"what": what, "config": config, "overrides": [*run, *overrides], "out": str(out), **more}


def run_cases(folder: Path, ranks: int, cases: list[dict]) -> None:
    launch_soundly(SCRIPT, ranks, case_file(folder, cases))


def outcome(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"outcome_rank_{rank}.json").read_text())


@pytest.fixture(scope="module")
def measured(folder) -> Path:
    """Two processes on two ranks; the second starts what the first did not finish."""
    model = str(folder / "trained" / "model")
    broken = folder / "trained_broken"
    tokenizer = yaml.safe_load((folder / "config.yaml").read_text())["model"]["source"]
    proxy = f"{{source: {model}, tokenizer: {tokenizer}, dtype: fp32}}"
    cases = [
        case(folder, "train", "trained"),
        case(folder, "reference", "reference", stop_in=["medicine", 3]),
    ]
    run_cases(folder, 2, cases)
    shutil.copytree(folder / "reference", folder / "reference_half")
    poison(folder / "trained" / "model", broken)
    cases = [
        case(folder, "train", "trained"),
        case(folder, "reference", "reference"),
        case(folder, "reference_from_model", "reference_of_model", model=model),
        case(folder, "evaluate", "evaluated", model=str(folder / "trained")),
        case(
            folder, "reference", "reference_lora", f"reference.model={proxy}", "reference.adapter={rank: 4}"
        ),
        case(folder, "evaluate", "stage0", "deepspeed={zero_optimization: {stage: 0}}", model=model),
        case(
            folder, "evaluate", "wild_stage0", "deepspeed={zero_optimization: {stage: 0}}", model=wild(folder)
        ),
        case(folder, "evaluate", "broken", model=str(broken)),
    ]
    evaluations = folder / "trained" / "evaluation.json"
    wild_evaluation = folder / "trained" / "evaluations" / "wild" / "evaluation.json"
    shared = [
        case(folder, "evaluate", "shared", *SHARED, model=model),
        case(folder, "reference", "reference_shared", *SHARED),
    ]
    run_cases(folder, 2, [*cases[:5], case(folder, "evaluate", "wild", model=wild(folder))])
    shutil.copy(evaluations, folder / "two_ranks_zero3.json")
    shutil.copy(wild_evaluation, folder / "wild_two_ranks_zero3.json")
    run_cases(folder, 2, shared)
    shutil.copy(evaluations, folder / "shared_packs.json")
    run_cases(folder, 1, cases[5:])
    shutil.copy(evaluations, folder / "one_rank_stage0.json")
    return folder


def wild(folder: Path) -> str:
    """A random model with weights so large that its answers differ."""
    model = folder / "wild"
    if not model.exists():
        shutil.copytree(folder / "sample" / "model", model)
        config = AutoConfig.from_pretrained(model, initializer_range=0.3)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
    return str(model)


def poison(model: Path, target: Path) -> None:
    """A copy of a model that gives NaN for one token of the sample's code domain only."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target)
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"][rare_token(target)] = float("nan")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def rare_token(model: Path) -> int:
    """A token that held-out code holds, and which neither law nor medicine nor the start-up probe do."""
    from versatune_ds.data.cache.prepare import open_caches

    caches = open_caches(load_config(model.parent / "config.yaml"))["eval"]
    law, medicine, code = ({int(t) for i in range(len(c)) for t in c.sample(i)[0]} for c in caches)
    return max(code - law - medicine)


def test_training_stops_early_and_stays_stopped(measured):
    """The loss of the last two evaluations is not below the best one, and starting again changes nothing."""
    lines = read_jsonl(measured / "trained" / "eval.jsonl")
    losses = [line["loss"] for line in lines]
    best = int(np.argmin(losses))
    assert best == len(losses) - 3 and lines[-1]["step"] < 100
    assert [line["step"] for line in lines] == list(range(0, lines[-1]["step"] + 1, 4))
    assert len(read_jsonl(measured / "trained" / "metrics.jsonl")) == lines[-1]["step"]
    assert outcome(measured / "trained")["result"] is True
    assert (measured / "trained" / "model" / "model.safetensors").is_file()


def test_references_are_trained_as_adapters(measured):
    """The loss falls from the model's own; nothing else of the model is trained or kept."""
    reference = outcome(measured / "reference_lora")["result"]
    assert reference["provenance"]["adapter"]["rank"] == 4
    for name in DOMAINS:
        lines = read_jsonl(measured / "reference_lora" / name / "eval.jsonl")
        assert lines[0]["domain_loss"][name] - 0.01 > reference["losses"][name]
        resolved = load_config(measured / "reference_lora" / name / "resolved.yaml")
        assert resolved.model.adapter.rank == 4 and resolved.optimizer.lr == 5e-3


def test_reference_is_the_lowest_held_out_loss_of_each_domain(measured):
    for rank in (0, 1):
        reference = outcome(measured / "reference", rank)["result"]
        assert set(reference["losses"]) == set(DOMAINS) and reference["method"] == "early_stopping"
    for name in DOMAINS:
        lines = read_jsonl(measured / "reference" / name / "eval.jsonl")
        best = min(lines, key=lambda line: line["domain_loss"][name])
        assert reference["losses"][name] == best["domain_loss"][name]
        assert reference["stderr"][name] == best["domain_stderr"][name] > 0
        assert reference["losses"][name] < lines[0]["domain_loss"][name] - 0.5
        others = [other for other in DOMAINS if other != name]
        assert all(line["domain_loss"][other] is None for line in lines for other in others)
        trained = read_jsonl(measured / "reference" / name / "metrics.jsonl")[-1]
        assert trained["cumulative_shares"]["samples"][name] == 1.0
        assert not (measured / "reference" / name / "checkpoints").exists()


def test_a_stopped_measurement_goes_on_where_it_was(measured):
    """It was stopped in the second domain: the first is not trained again, the second resumes."""
    half = measured / "reference_half"
    assert (half / "law" / "result.json").is_file()
    assert not (half / "medicine" / "result.json").exists() and not (half / "code").exists()
    assert len(read_jsonl(half / "medicine" / "metrics.jsonl")) == 4
    untouched = (half / "law" / "metrics.jsonl").read_bytes()
    assert (measured / "reference" / "law" / "metrics.jsonl").read_bytes() == untouched
    steps = [line["step"] for line in read_jsonl(measured / "reference" / "medicine" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 4
    resumed = read_jsonl(measured / "reference" / "medicine" / "metrics.jsonl")[:4]
    assert resumed == read_jsonl(half / "medicine" / "metrics.jsonl")


def test_evaluation_is_that_of_the_run_on_any_ranks_and_stage(measured):
    """The exported model's losses are the best line of eval.jsonl; two ranks ZeRO-3, each with packs of its
    own or sharing them == one rank, no ZeRO."""
    best = min(read_jsonl(measured / "trained" / "eval.jsonl")[1:], key=lambda line: line["loss"])
    first = ModelEvaluation.read(measured / "two_ranks_zero3.json")
    second = ModelEvaluation.read(measured / "one_rank_stage0.json")
    shared = ModelEvaluation.read(measured / "shared_packs.json")
    assert outcome(measured / "evaluated")["result"]["source"].endswith("trained/model")
    for found in (first, second, shared):
        sums = found.sums
        assert TABLE.by_name(sums.mean_loss()) == pytest.approx(best["domain_loss"], rel=1e-5)
        assert TABLE.by_name(sums.stderr()) == pytest.approx(best["domain_stderr"], rel=1e-3)
        assert {name: int(n) for name, n in TABLE.by_name(sums.samples).items()} == best["domain_samples"]
    assert first.fingerprints == second.fingerprints == shared.fingerprints
    for name in DOMAINS:
        for other in (second, shared):
            np.testing.assert_allclose(first.losses[name], other.losses[name], rtol=1e-4)
            assert np.array_equal(first.tokens[name], other.tokens[name])


def test_answers_are_those_of_the_run_on_any_ranks_and_stage(measured):
    """Two ranks with parts of every weight, in training and afterwards; one rank that holds all of them; and
    the same of a model that says something else to everybody."""
    evaluations = read_jsonl(measured / "trained" / "eval.jsonl")
    best = min(evaluations[1:], key=lambda line: line["loss"])
    lines = read_jsonl(measured / "trained" / "answers.jsonl")
    assert len(lines) == len(evaluations) * len(DOMAINS) * ASKED["samples"]
    trained = [line for line in lines if line.pop("step") == best["step"]]
    for name in ("two_ranks_zero3.json", "one_rank_stage0.json"):
        found = ModelEvaluation.read(measured / name)
        assert list(found.answers) == trained
        assert {name: sum(of) / 3 for name, of in found.scores().items()} == best["domain_score"]
    parted = ModelEvaluation.read(measured / "wild_two_ranks_zero3.json")
    whole = ModelEvaluation.read(measured / "trained" / "evaluations" / "wild" / "evaluation.json")
    assert parted.provenance["world_size"] == 2 and whole.provenance["world_size"] == 1
    assert parted.answers == whole.answers and len({line["answer"] for line in whole.answers}) > 5
    assert ModelEvaluation.read(measured / "shared_packs.json").answers == ()
    assert not (measured / "reference" / "law" / "answers.jsonl").read_text()


def test_reference_losses_of_shared_packs_are_the_same(measured):
    apart, shared = (outcome(measured / name)["result"] for name in ("reference", "reference_shared"))
    assert shared["losses"] == pytest.approx(apart["losses"], rel=1e-3)


def test_reference_of_a_model_is_its_evaluation(measured):
    reference = outcome(measured / "reference_of_model")["result"]
    expected = ModelEvaluation.read(measured / "two_ranks_zero3.json")
    assert reference["losses"] == pytest.approx(TABLE.by_name(expected.sums.mean_loss()), rel=1e-9)
    assert reference["stderr"] == pytest.approx(TABLE.by_name(expected.sums.stderr()), rel=1e-9)
    assert reference["method"] == "evaluated" and reference["bytes_per_token"]["law"] > 1
    assert reference["fingerprints"]["model"] == expected.fingerprints.model


def test_nan_losses_are_an_error_that_names_the_samples(measured):
    failure = outcome(measured / "broken")["error"]
    assert failure["type"] == "DivergenceError"
    assert "not finite" in failure["text"] and "code.jsonl:" in failure["text"]
    assert "law.jsonl" not in failure["text"]


@pytest.fixture(scope="module")
def alarms(measured) -> list[str]:
    """What three runs say: with measured references, with impossible ones, and without evaluation."""
    path = measured / "reference.json"
    path.write_text(json.dumps(outcome(measured / "reference")["result"]))
    common = ["train.max_steps=1", "weights={strategy: fostering, every_n_steps: 100}"]
    common.append("checkpoint={export_at_end: false}")
    evaluated, too_high = "evaluation={every_n_steps: 100}", "{law: 9.0, medicine: 9.0, code: 0.01}"
    cases = [
        case(measured, "train", "a", *common, evaluated, f"weights.reference={path}"),
        case(measured, "train", "b", *common, evaluated, f"weights.reference={too_high}"),
        case(measured, "train", "c", *common, "evaluation={}", f"weights.reference={too_high}"),
    ]
    (done,) = launch(SCRIPT, 1, case_file(measured, cases))
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.split("run folder:")


def test_measured_reference_losses_raise_no_alarm(alarms):
    assert "(early_stopping with" in alarms[0]
    assert "warning: reference losses" not in alarms[0].replace(" [rank 0]", "")


def test_references_that_cannot_be_right_raise_alarms_before_the_first_step(alarms):
    assert "reference_reached: law" in alarms[1] and "reference_near_zero: code" in alarms[1]
    assert "reference_reached: code" not in alarms[1]
    assert "reference_near_zero: code" in alarms[2] and "reference_reached" not in alarms[2]
