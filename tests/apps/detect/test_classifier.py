"""The embedded classifier: it tells domains, says how well, and needs data of each."""

from __future__ import annotations

import random

import numpy as np
import pytest
from prepared import data_config, qwen_like_tokenizer, write_jsonl

from versatune_ds.apps.detect.classifier import ClassifierJudge, confusion_table
from versatune_ds.apps.detect.judge import UNKNOWN
from versatune_ds.apps.detect.sources import WINDOW
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


def judge_of(tokenizer, train, held_out, names=NAMES, **given):
    judge = ClassifierJudge(names, train, held_out, tokenizer, seed=0, max_chars=8000, **given)
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
    judge = judge_of(tokenizer, caches["train"], caches["eval"], topics={name: [] for name in NAMES})
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


# --- sources that it has not seen ---------------------------------------------------------------------------


class Lengths:
    """An embedder whose vectors say how many words a text has of each list, and else nothing."""

    kind, fingerprint = "base", "of lengths"

    def embed(self, texts):
        counts = [[sum(word in text for word in words) for words in WORDS.values()] for text in texts]
        strange = [
            [[5.0 * ("quux" in text), *(1.0 + np.array(row))]]
            for text, row in zip(texts, counts, strict=True)
        ]
        return np.array(strange, dtype=np.float32)

    def embed_once(self, texts, folder):
        return self.embed(texts)

    def close(self):
        """Nothing is held."""


def corpora(folder, name, shared):
    """Two files a domain; each has words of its own, and where they are shared some of its domain."""
    sources = []
    for domain in NAMES:
        for file in range(2):
            own = [f"{domain}{'xy'[file]}{letter}" for letter in "abcd"]
            generator = random.Random(f"{domain} {file}")
            lines = []
            for _ in range(40):
                chosen = generator.choices(own, k=5) + generator.choices(WORDS[domain], k=5 if shared else 0)
                generator.shuffle(chosen)
                lines.append({"prompt": " ".join(chosen[:4]), "completion": " ".join(chosen[4:])})
            path = write_jsonl(folder / f"{name}-{domain}-{file}.jsonl", lines)
            sources.append({"path": str(path), "domain": domain})
    return sources


@pytest.mark.parametrize(("shared", "is_honest"), [(True, True), (False, False)])
def test_what_it_knows_of_sources_only_is_seen_and_said(tmp_path, caplog, shared, is_honest):
    tokenizer = qwen_like_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sources = corpora(tmp_path, "train", shared)
    config = data_config(tmp_path, tmp_path / "tokenizer", sources, names=NAMES)
    judge = judge_of(tokenizer, prepare(config, progress=False).caches["train"], [None] * 3)
    facts = judge.facts()
    assert facts["held_out_accuracy"] > 0.95
    assert (facts["left_out_accuracy"] > 0.9) == is_honest
    assert ("knows your corpora better than their domains" in caplog.text) != is_honest
    assert set(facts["left_out_by_domain"]) == set(NAMES)
    assert all(len(rows) >= 2 for rows in facts["left_out_sources"].values())
    np.testing.assert_allclose(np.sum(facts["left_out_sources"]["law"], axis=1), 1.0)


def test_a_text_unlike_all_that_it_has_seen_is_unknown(prepared):
    tokenizer, caches = prepared
    judge = ClassifierJudge(
        NAMES, caches["train"], caches["eval"], tokenizer, 0, 8000, embedders=[Lengths()], texts=40
    )
    judge.open()
    assert set(judge.facts()["trust"]) == {"words", "base"} and judge.identity()["texts"] == 40
    known, strange = judge.judge([(0, " ".join(WORDS["law"][:6])), (1, "quux " * 20)])
    assert known.probabilities.argmax() == 0 and known.problem is None
    assert strange.probabilities is None and strange.problem == UNKNOWN
    words_only = judge_of(tokenizer, caches["train"], caches["eval"])
    assert words_only.facts()["unknown_beyond"] is None and words_only.identity() != judge.identity()


class Blind(Lengths):
    """An encoder to which strange texts look like the others."""

    kind = "encoder"

    def embed(self, texts):
        vectors = super().embed(texts)
        vectors[..., 0] = 0.0
        return vectors


def test_what_is_unknown_is_said_by_the_examined_model_whatever_an_encoder_sees(prepared):
    tokenizer, caches = prepared
    judge = judge_of(tokenizer, caches["train"], caches["eval"], embedders=[Lengths(), Blind()], texts=40)
    (strange,) = judge.judge([(0, "quux " * 20 + " ".join(WORDS["law"]))])
    assert strange.problem == UNKNOWN


def test_a_long_text_is_judged_by_the_mean_of_its_windows(prepared):
    tokenizer, caches = prepared
    judge = judge_of(tokenizer, caches["train"], caches["eval"])
    halves = [" ".join(WORDS[name] * 20)[:WINDOW] for name in ("law", "code")]
    first, second, both = judge.judge([(0, halves[0]), (1, halves[1]), (2, "".join(halves))])
    np.testing.assert_allclose(
        both.probabilities, (first.probabilities + second.probabilities) / 2, rtol=1e-9
    )
