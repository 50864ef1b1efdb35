"""The embedded classifier: it tells domains, says how well, and needs data of each."""

from __future__ import annotations

import random

import numpy as np
import pytest
from prepared import data_config, qwen_like_tokenizer, write_jsonl

from versatune_ds.apps.detect.classifier import ClassifierJudge, confusion_table
from versatune_ds.data.cache.prepare import prepare
from versatune_ds.foundations.errors import DataError

WORDS = {
    "law": [
        "court",
        "judge",
        "statute",
        "appeal",
        "plaintiff",
        "contract",
        "clause",
        "tort",
        "verdict",
        "counsel",
    ],
    "code": [
        "function",
        "loop",
        "array",
        "pointer",
        "compile",
        "variable",
        "string",
        "class",
        "return",
        "module",
    ],
    "other": [
        "weather",
        "garden",
        "soup",
        "journey",
        "music",
        "holiday",
        "river",
        "bicycle",
        "painting",
        "letter",
    ],
}
NAMES = list(WORDS)


def rows(domain, count, seed):
    generator = random.Random(f"{domain} {seed}")
    words = WORDS[domain]
    return [
        {
            "prompt": " ".join(generator.choices(words, k=6)) + "?",
            "completion": " ".join(generator.choices(words, k=8)) + ".",
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder, tokenizer, caches): law has four times the data of the others."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = qwen_like_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    counts = {"law": 160, "code": 40, "other": 40}
    sources = {
        split: [
            {"path": str(write_jsonl(folder / f"{split}-{d}.jsonl", rows(d, n // share, split))), "domain": d}
            for d, n in counts.items()
        ]
        for split, share in (("train", 1), ("eval", 4))
    }
    config = data_config(folder, folder / "tokenizer", sources["train"], names=NAMES, eval=sources["eval"])
    return tokenizer, prepare(config, progress=False).caches


def judge_of(tokenizer, train, held_out, names=NAMES):
    judge = ClassifierJudge(names, train, held_out, tokenizer, seed=0, max_chars=8000)
    judge.open()
    return judge


def test_it_tells_domains_and_reports_how_well(prepared, caplog):
    tokenizer, caches = prepared
    judge = judge_of(tokenizer, caches["train"], caches["eval"])
    texts = [(10 + i, " ".join(WORDS[name][:5])) for i, name in enumerate(NAMES)]
    found = list(judge.judge(texts))
    assert [j.index for j in found] == [10, 11, 12]
    for i, judgement in enumerate(found):
        assert judgement.probabilities.sum() == pytest.approx(1) and judgement.probabilities.argmax() == i
        assert judgement.probabilities[i] > 0.8
    facts = judge.facts()
    assert facts["held_out_from"] == "held-out data" and facts["held_out_samples"] == 40 + 10 + 10
    assert facts["held_out_accuracy"] > 0.95 and facts["confusion"]["law"]["law"] >= 38
    assert confusion_table(NAMES, judge.confusion).splitlines()[1].split()[0] == "law"


def test_the_size_of_a_domain_is_not_its_prior(prepared):
    tokenizer, caches = prepared
    judge = judge_of(tokenizer, caches["train"], caches["eval"])
    (judgement,) = judge.judge([(0, "0 1 2 3")])  # words of no domain
    assert judgement.probabilities.max() < 0.5, judgement.probabilities


def test_without_held_out_data_a_fifth_is_held_out(prepared):
    tokenizer, caches = prepared
    judge = judge_of(tokenizer, caches["train"], [caches["eval"][0], None, caches["eval"][2]])
    facts = judge.facts()
    assert facts["held_out_from"] == "20% of the training data" and facts["held_out_samples"] == 32 + 8 + 8
    assert facts["training_samples"] == 240 - 48


def test_a_domain_without_data_is_an_error_that_names_it(prepared):
    tokenizer, caches = prepared
    with pytest.raises(
        DataError, match=r"at least 10 training samples.*too few in maths \(0\).*endpoint or model"
    ):
        judge_of(tokenizer, [*caches["train"], None], [None] * 4, names=[*NAMES, "maths"])


def test_other_data_is_another_judge(prepared):
    tokenizer, caches = prepared
    one = ClassifierJudge(NAMES, caches["train"], caches["eval"], tokenizer, seed=0, max_chars=8000)
    other = ClassifierJudge(NAMES, caches["train"][::-1], caches["eval"], tokenizer, seed=0, max_chars=8000)
    assert one.identity() != other.identity()


def test_the_same_data_and_seed_give_the_same_judgements(prepared):
    tokenizer, caches = prepared
    texts = [(0, "court soup function")]
    first, second = (
        next(iter(judge_of(tokenizer, caches["train"], caches["eval"]).judge(texts))) for _ in range(2)
    )
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
