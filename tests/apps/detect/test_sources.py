"""Texts for the embedded judge: wording that samples share, windows, sources; what is learned from them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.special import softmax
from speaking_models import unigram_model
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from versatune_ds.apps.detect import learning
from versatune_ds.apps.detect.embedding import Embedder, drop_layers_above, packaged_encoder
from versatune_ds.apps.detect.run import build_embedders
from versatune_ds.apps.detect.sources import (
    WINDOW,
    LabelledTexts,
    group,
    random_window,
    windows,
    without_wording,
)
from versatune_ds.apps.detect.topics import topics_of
from versatune_ds.config.load import validate_config
from versatune_ds.config.model import Model

WORDS = [f"w{i}" for i in range(200)]


def sentence(seed, count=12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def test_what_many_samples_say_alike_is_cut_out():
    asked = "Answer the question below with one letter."
    texts = [f"{asked} {sentence(i)} Options: A" for i in range(20)]
    cut = without_wording(
        [*texts, "answer THE question below with a whole sentence, please: " + sentence(99)]
    )
    # runs of five words or signs: all of the instruction, not "Options: A", which are three
    for i in range(20):
        assert cut[i] == f"{sentence(i)} Options: A"
    assert cut[20].startswith("a whole sentence, please")  # "answer the question below with" is common
    same = [asked] * 5
    assert without_wording(same) == same  # nothing would be left


def test_windows_cover_a_text():
    text = " ".join(f"{i:04d}" for i in range(1000))  # 4,999 characters
    assert windows("short") == ["short"]
    found = windows(text[: 2 * WINDOW])
    assert "".join(found) == text[: 2 * WINDOW]
    found = windows(text)
    assert len(found) == 4 and found[0] == text[:WINDOW] and found[-1] == text[-WINDOW:]
    window = random_window(text, np.random.default_rng(0))
    assert window in text and len(window) == WINDOW and window[:4].isdigit() and window != text[:WINDOW]


def test_sources_are_files_and_groups_of_alike_samples():
    letters = [f"dear sir, {sentence(i)} yours truly" for i in range(30)]
    tables = [f"| {i} | {i + 1} | total = {i * i} % |" for i in range(30)]
    sources = group(letters + tables, ["a"] * 60)
    assert not set(sources[:30]) & set(sources[30:])
    sources = group(letters, ["a"] * 20 + ["b"] * 10)
    assert not set(sources[:20]) & set(sources[20:]) and set(sources) == set(range(len(set(sources))))
    assert group(["one", "two"], ["a", "a"]).tolist() == [0, 0]


def test_topics_are_known_given_and_of_mathematics_once():
    known = topics_of(["law", "Science", "botany"], {})
    assert "lawsuits, plaintiffs and defendants" in known[0] and known[2] == []
    assert "algebra and geometry" in known[1]
    (number,) = [text for text in topics_of(["math"], {})[0] if text.startswith("Two dice")]
    assert number in known[1]
    assert not {"algebra and geometry", number} & set(topics_of(["science", "math"], {})[0])
    assert topics_of(["law"], {"law": ["tort"]}) == [["tort"]]


def test_domains_weigh_the_same_and_sources_half_way():
    samples = LabelledTexts([""] * 6, np.array([0, 0, 0, 0, 0, 1]), np.array([0, 0, 0, 0, 1, 0]))
    # sources of 4 and 1 samples weigh as 2 : 1
    weights = learning.sample_weights(samples) / learning.DOMAIN_WEIGHT
    np.testing.assert_allclose(weights, [1 / 6] * 4 + [1 / 3, 1.0], rtol=1e-12)


def test_features_that_do_not_carry_over_are_not_trusted():
    generator = np.random.default_rng(0)
    domains = np.repeat([0, 1, 2], 100)
    right = softmax(2.0 * np.eye(3)[domains] + generator.normal(size=(300, 3)), axis=1)
    guess = softmax(3.0 * generator.normal(size=(300, 3)), axis=1)
    good, bad = learning.trust(np.log(np.stack([right, guess], axis=1)), domains)
    assert good > 0.8 and bad < 0.1


def test_the_vote_by_hand():
    # cosines 1 and 0 to the samples of domain 0, 0.8 to that of domain 1 and 0.6 to a topic of domain 2
    features = np.array([[2.0, 0.0], [0.0, 1.0], [0.8, 0.6]], dtype=np.float32)
    samples = LabelledTexts([""] * 3, np.array([0, 0, 1]), np.array([0, 0, 0]))
    topic = np.array([[6.0, 8.0]], dtype=np.float32)
    vote = learning.fit("base", features, samples, topic, np.array([2]))
    found = vote.predict_proba(np.array([[5.0, 0.0]], dtype=np.float32))
    # two samples share the weight of domain 0; the topic weighs twice as much as a domain's samples
    heard = np.exp(np.array([1.0, 0.0, 0.8, 0.6]) / learning.WARMTH["base"]) * [0.5, 0.5, 1.0, 2.0]
    expected = np.array([heard[0] + heard[1], heard[2], heard[3]]) / heard.sum()
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_a_domain_of_two_parts_is_told_from_what_lies_between_them():
    generator = np.random.default_rng(0)
    angles = np.repeat([0.0, 1.0, 2.0], 20) + 0.05 * generator.normal(size=60)
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    samples = LabelledTexts([""] * 60, np.repeat([0, 1, 0], 20), np.zeros(60, dtype=np.int64))
    vote = learning.fit("encoder", features, samples, features[:0], np.zeros(0, dtype=np.int64))
    assert (vote.predict_proba(features).argmax(1) == samples.domains).all()


def test_a_left_out_source_is_judged_by_the_others():
    # the second feature tells sources of domain 0 only; the first tells the domains everywhere
    domains, sources = np.repeat([0, 1], 20), np.tile([0, 1], 20)
    features = scipy.sparse.csr_array(np.stack([2.0 * domains - 1, (domains == 0) * (sources == 0)], axis=1))
    samples = LabelledTexts([""] * 40, domains, sources)
    none = np.zeros(0, dtype=np.int64)
    told = learning.left_out("words", features, samples, features[:0], none, 2)
    assert (told.argmax(1) == domains).all()
    alone = learning.left_out("words", features[:, 1:], samples, features[:0, 1:], none, 2)
    of_first = (domains == 0) & (sources == 0)
    np.testing.assert_allclose(np.exp(alone[of_first]), 0.5, atol=1e-3)  # it has not seen the feature at work
    seen = learning.fit("words", features[:, 1:], samples, features[:0, 1:], none)
    assert (learning.log_probabilities(seen, features[:, 1:], 2)[of_first, 0] > np.log(0.6)).all()


def test_strangeness_by_hand():
    known = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    vectors = np.array([[3.0, 0.0], [3.0, 4.0]], dtype=np.float32)
    # fewer than five are known: cosines 1, 1, 0 and 0.6, 0.6, 0.8
    np.testing.assert_allclose(learning.strangeness(vectors, known), [1 / 3, 1 / 3], rtol=1e-6)
    hidden = np.array([[True, False, False]] * 2)  # -1, 1, 0 and -1, 0.6, 0.8
    np.testing.assert_allclose(learning.strangeness(vectors, known, hidden), [1.0, 1 - 0.4 / 3], rtol=1e-6)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Embedder:
    torch.manual_seed(0)
    folder = unigram_model(tmp_path_factory.mktemp("embedder"), {" law": 0.4, " code": 0.4}, end=0.2)
    settings = Model(source=str(folder), dtype="fp32")
    found = Embedder("base", settings, 0, torch.device("cpu"))
    found.open()
    with torch.no_grad():  # its words are one vector otherwise
        found.model.get_input_embeddings().weight.normal_()
    return found


def test_a_vector_is_the_mean_without_the_first_token_whatever_stands_beside(embedder):
    together = embedder.embed([" law law code", " code", " law code code law code"])
    assert together.shape == (3, 3, 16)
    np.testing.assert_allclose(embedder.embed([" law law code"])[0], together[0], rtol=1e-4, atol=1e-6)
    ids = torch.tensor([embedder.tokenizer(" law law code")["input_ids"]])
    with torch.inference_mode():
        states = embedder.model(input_ids=ids, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(together[0, 0], states[1][0, 1:].mean(0).numpy(), rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        alone = embedder.model(input_ids=ids[:, 2:], output_hidden_states=True).hidden_states
    np.testing.assert_allclose(together[1, 0], alone[1][0, 0].numpy(), rtol=1e-4, atol=1e-6)


def test_vectors_are_made_once(embedder, tmp_path, monkeypatch, caplog):
    first = embedder.embed_once([" law", " code"], tmp_path)
    calls, original = [], Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, *given: calls.append(1) or original(self, *given))
    np.testing.assert_array_equal(embedder.embed_once([" law", " code"], tmp_path), first)
    assert not calls
    embedder.embed_once([" law", " law"], tmp_path)
    whole = (tmp_path / "judge_base.npz").read_bytes()
    for damaged in (b"not one", b"", whole[:40]):
        (tmp_path / "judge_base.npz").write_bytes(damaged)
        caplog.clear()
        embedder.embed_once([" law", " law"], tmp_path)
        assert "made again" in caplog.text
    assert len(calls) == 4


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_states_do_not_depend_on_the_layers_above_that_are_dropped(model):
    torch.manual_seed(0)
    if model == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        whole = LlamaModel(LlamaConfig(vocab_size=9, num_hidden_layers=6, **shape)).eval()
    else:
        whole = GPT2Model(GPT2Config(vocab_size=9, n_embd=16, n_layer=6, n_head=2)).eval()
    given = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]]), "output_hidden_states": True, "use_cache": False}
    with torch.inference_mode():
        before = whole(**given).hidden_states
        drop_layers_above(whole, 3, 6)
        after = whole(**given).hidden_states
    assert len(after) == 5  # of the embedding and of four layers
    for i in range(4):
        torch.testing.assert_close(after[i], before[i], rtol=0, atol=0)


def test_an_installed_encoder_is_found_and_said_and_what_is_missed_without(tmp_path, monkeypatch, caplog):
    subject = unigram_model(tmp_path / "subject", {" law": 0.8})
    raw = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"source": str(subject)},
        "data": {"train": [{"path": "a.jsonl", "domain": "law"}]},
        "domains": {"names": ["law"]},
        "batch": {"pack_len": 64, "packs_per_step": 1},
        "train": {"max_steps": 1},
    }
    caplog.set_level("INFO")
    config, cpu = validate_config(raw, "test"), torch.device("cpu")
    monkeypatch.setattr("versatune_ds.apps.detect.embedding.PACKAGE", "package_of_an_encoder")
    assert packaged_encoder() is None
    assert [each.kind for each in build_embedders(config, cpu)] == ["base"]
    assert "pip install 'versatune-ds[judge]'" in caplog.text
    folder = tmp_path / "site" / "package_of_an_encoder"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert packaged_encoder() is None  # it holds no model
    tiny = LlamaConfig(vocab_size=9, hidden_size=16, num_attention_heads=2)
    LlamaModel(tiny).save_pretrained(folder / "model")
    base, encoder = build_embedders(config, cpu)
    assert (base.kind, encoder.kind) == ("base", "encoder")
    assert encoder.settings.source == str(folder / "model") and str(folder / "model") in caplog.text
    assert not build_embedders(validate_config({**raw, "detect": {"judge": {"probe_texts": 0}}}, "test"), cpu)
