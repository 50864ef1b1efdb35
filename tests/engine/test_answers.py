"""Answers of a run against transformers' own `generate` of the exported model, and of every kind of layer."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import read_jsonl, run_cases
from plain_backend import CPU, PlainRun, plain_run
from small_runs import cut_back, small_run
from tiny_families import attend_by_sample, family_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from versatune_ds.config.load import load_config
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.engine.answers.decoding import continuations, cut_text, generating
from versatune_ds.engine.answers.questions import last_supervised
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.foundations.errors import ConfigError, DataError

STEPS, SAMPLES, LONGEST = 4, 5, 12
DOMAINS = ("law", "code")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    (folder / "contains.py").write_text(
        "def has_a_letter(answer, reference):\n"
        "    if answer != reference and 'x' in answer: raise KeyError('an x')\n"
        "    return 'e' in answer\n"
    )
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 2},
        optimizer={"lr": 3e-3},
        train={"max_steps": STEPS},
        model={"dtype": "fp32"},
        evaluation={
            "every_n_steps": 2,
            "max_samples_per_domain": 2,
            "generate": {
                "samples": SAMPLES,
                "max_new_tokens": LONGEST,
                "batch_size": 2,
                "score": {"law": "exact", "code": f"{folder / 'contains.py'}:has_a_letter"},
            },
        },
        checkpoint={"every_n_steps": 1, "keep_last": 100},
    )
    architecture = folder / "sample" / "model" / "config.json"  # weights so large that prompts matter
    architecture.write_text(json.dumps({**json.loads(architecture.read_text()), "initializer_range": 0.3}))
    return config


def run(config: Path, name: str, *overrides: str) -> PlainRun:
    return plain_run(config, f"run.dir={config.parent / name}", *overrides)


@pytest.fixture(scope="module")
def whole(config: Path) -> PlainRun:
    return run(config, "whole")


def rows_by_source(config: Path) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
    """(domain, place) of held-out samples -> ids before the last supervised turn, and ids of that turn."""
    found = {}
    for cache in open_caches(load_config(config))["eval"]:
        for i in range(len(cache)):
            tokens, mask = cache.sample(i)
            start = max(j for j in range(1, len(mask)) if mask[j] and not mask[j - 1])
            place = ":".join(map(str, cache.source_of(i)))
            found[cache.domain, place] = tokens[:start].tolist(), tokens[start:].tolist()
    return found


def test_answers_are_those_of_the_exported_model(config, whole):
    """Every text of the last evaluation, one prompt at a time, with the generation settings of the export."""
    exported = AutoModelForCausalLM.from_pretrained(whole.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole.folder / "model")
    rows = rows_by_source(config)
    lines = [line for line in whole.lines("answers") if line["step"] == STEPS]
    assert [line["domain"] for line in lines] == ["law"] * SAMPLES + ["code"] * SAMPLES
    for line in lines:
        prompt, reference = rows[line["domain"], line["source"]]
        ids = exported.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LONGEST)
        said = ids[0, len(prompt) :].tolist()
        assert line["answer"] == tokenizer.decode(said, skip_special_tokens=True)
        assert line["reference"] == tokenizer.decode(reference, skip_special_tokens=True).rstrip("\n")
        assert line["finished"] is (said[-1] == exported.generation_config.eos_token_id)
        assert line["tokens"] == len(said) - line["finished"]
        assert line["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)[-1000:]
    assert len({line["answer"] for line in lines}) > SAMPLES


def test_the_same_samples_are_asked_at_every_evaluation_and_scored(whole):
    lines, evaluations = whole.lines("answers"), whole.lines("eval")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    by_step = {step: [line for line in lines if line["step"] == step] for step in (0, 2, 4)}
    asked = [(line["domain"], line["source"]) for line in by_step[0]]
    assert len(set(asked)) == len(asked) == 2 * SAMPLES
    for evaluation in evaluations:
        found = by_step[evaluation["step"]]
        assert [(line["domain"], line["source"]) for line in found] == asked
        for line in found:
            if line["domain"] == "law":
                expected = float(line["answer"].split() == line["reference"].split())
            elif line["answer"] != line["reference"] and "x" in line["answer"]:
                expected = None
            else:
                expected = float("e" in line["answer"])
            assert line["score"] == expected
        for domain in DOMAINS:
            scores = [line["score"] for line in found if line["domain"] == domain]
            known = [score for score in scores if score is not None]
            assert evaluation["domain_answers"][domain] == len(known)
            mean = sum(known) / len(known) if known else None
            assert evaluation["domain_score"][domain] == mean
        assert evaluation["generate_s"] > 0
    texts = [[line["answer"] for line in by_step[step]] for step in (0, 4)]
    assert texts[0] != texts[1]


def test_an_answer_that_the_function_fails_on_has_no_score_and_the_run_goes_on(config, caplog):
    broken = config.parent / "broken.py"
    broken.write_text("def score(answer, reference):\n    return {reference: 1}[answer]\n")
    with caplog.at_level("WARNING"):
        score = f"evaluation.generate.score={{law: '{broken}:score'}}"
        ours = run(config, "failing", score, "train.max_steps=1")
    assert ours.finished and {line["score"] for line in ours.lines("answers")} == {None}
    assert ours.lines("eval")[0]["domain_score"] == {"law": None}
    assert "5 answers have no score; the first: " in caplog.text and "KeyError" in caplog.text


def test_a_resumed_run_has_the_answers_of_one_that_was_not_killed(config, whole):
    target = config.parent / "resumed"
    cut_back(whole.folder, target, 3)
    assert len(read_jsonl(target / "answers.jsonl")) == 3 * 2 * SAMPLES
    resumed = run(config, "resumed")
    assert resumed.lines("answers") == whole.lines("answers")


def test_a_finished_run_trains_as_one_that_asks_nothing(config, whole):
    """Generation leaves no trace in the model: attention, mode, settings."""
    silent = run(config, "silent", "evaluation.generate=null")
    assert silent.lines("answers") == []
    for name, parameter in silent.parameters.items():
        assert torch.equal(parameter, whole.parameters[name]), name


@pytest.mark.parametrize(
    ("overrides", "error", "expected"),
    [
        (["evaluation.generate.score=number"], ConfigError, "holds no number"),
        (["evaluation.generate.score=nowhere.py:score"], ConfigError, "FileNotFoundError"),
        (["evaluation.generate.max_new_tokens=100000"], DataError, r"none of the \d+ held-out .* too long"),
        (["batch.sequence_parallel=2"], ConfigError, "set sequence_parallel: 1"),
        (["evaluation.generate.score={lw: exact}"], ConfigError, r"generate.score: unknown domains \['lw'\]"),
        (["evaluation.domains=[law]"], ConfigError, "generate.score names code, which `domains` leaves out"),
        (["data.eval=[]", "evaluation.every_n_steps=null"], ConfigError, "give data.eval"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_first_step(config, overrides, error, expected):
    with pytest.raises(error, match=expected):
        run(config, "refused", *overrides)
    assert not (config.parent / "refused" / "metrics.jsonl").exists()


def test_the_last_supervised_turn():
    weights = ([0, 1, 1], [0, 1, 0, 0, 2.5, 1], [1, 0, 1, 0], [0, 1, 0, 1, 0, 1])
    found = [last_supervised(np.array(w)) for w in weights]
    assert found == [(1, 3), (4, 6), (2, 3), (5, 6)]


class Decoder:
    """A tokenizer of single letters."""

    def decode(self, ids, **_):
        return "".join(chr(i) for i in ids)


def test_a_text_ends_before_its_first_end_token():
    assert cut_text(Decoder(), [97, 98, 1, 99], [1, 2]) == ("ab", 2, True)
    assert cut_text(Decoder(), [97, 98], [1]) == ("ab", 2, False)
    assert cut_text(Decoder(), [1], [1]) == ("", 0, True)


ROWS = [[5, 6, 7], [9], list(range(3, 14)), [4, 4]]
SETTINGS = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=2, pad_token_id=2)


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "mistral",
        "llama, dynamic rope",
        "phi3, longrope",
        "gemma2",
        "gemma3_text, capped",
        "qwen3_moe",
        "cohere2",
        "qwen2, tied",
    ],
)
def test_a_model_that_takes_packs_generates_as_it_is_in_transformers(kind):
    """Sliding windows, positions by length, capped and scaled logits, experts; padded in one batch."""
    theirs = family_model(kind).eval()
    model = PackedCausalLM(attend_by_sample(family_model(kind)), "torch").eval()
    attention = model.lm.config._attn_implementation
    for batch in [[row] for row in ROWS] if model.rotary else [ROWS]:
        with generating(model) as lm, torch.no_grad():
            ours = continuations(lm, batch, SETTINGS, CPU)
        for row, tokens in zip(batch, ours, strict=True):
            theirs_alone = copy.deepcopy(theirs)  # its rotary positions remember the row before
            theirs_alone.generation_config = GenerationConfig()
            expected = theirs_alone.generate(torch.tensor([row]), generation_config=SETTINGS)[0, len(row) :]
            assert tokens[: len(expected)] == expected.tolist()
            assert set(tokens[len(expected) :]) <= {2}
    assert model.lm.config._attn_implementation == attention


def test_an_adapter_answers(config, whole):
    """Those of the base before its first step, and others afterwards."""
    shutil.copytree(whole.folder / "model", config.parent / "base", dirs_exist_ok=True)
    ours = run(
        config,
        "adapter",
        f"model.source={config.parent / 'base'}",
        "model.weights=pretrained",
        "model.adapter={kind: lora, rank: 4}",
        "evaluation.generate.score={law: exact}",
    )
    before, after = (
        [line["answer"] for line in ours.lines("answers") if line["step"] == step] for step in (0, STEPS)
    )
    base = [line["answer"] for line in whole.lines("answers") if line["step"] == STEPS][:SAMPLES]
    assert before == base and after != base


@pytest.mark.slow
def test_an_adapter_answers_the_same_on_ranks(config, whole):
    """Two ranks under ZeRO-1 to 3: before the first step as the base, afterwards all alike."""
    folder = config.parent
    shutil.copytree(whole.folder / "model", folder / "base", dirs_exist_ok=True)
    settings = [
        f"model.source={folder / 'base'}",
        "model.weights=pretrained",
        "model.adapter={kind: lora, rank: 4}",
        "evaluation.generate.score={law: exact}",
        "checkpoint.export_at_end=false",
    ]
    cases = [
        {
            "config": str(config),
            "overrides": [
                *settings,
                f"run.dir={folder / f'stage_{stage}'}",
                f"deepspeed={{zero_optimization: {{stage: {stage}}}}}",
            ],
            "sabotage": "nothing",
        }
        for stage in (1, 2, 3)
    ]
    run_cases(folder, 2, cases)
    base = [line["answer"] for line in whole.lines("answers") if line["step"] == STEPS][:SAMPLES]
    said = []
    for stage in (1, 2, 3):
        lines = read_jsonl(folder / f"stage_{stage}" / "answers.jsonl")
        before, after = ([x["answer"] for x in lines if x["step"] == step] for step in (0, STEPS))
        assert before == base and after != base
        said.append(after)
    assert said[0] == said[1] == said[2]
