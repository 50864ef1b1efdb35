"""Generation: what is sampled, from which prompt, with which settings, and when it is the same again."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from prepared import data_config, qwen_like_tokenizer
from speaking_models import unigram_model, word_tokenizer
from transformers import GenerationConfig, LlamaConfig

from versatune_ds.apps.detect import generate
from versatune_ds.apps.detect.generate import (
    GeneratedText,
    batch_seed,
    build_generator,
    choose_generator,
    end_tokens,
    load_text_tokenizer,
    max_new_tokens,
    prompt_token,
    subject,
    subject_fingerprint,
)
from versatune_ds.foundations.errors import ConfigError, VersaTuneError

CPU = torch.device("cpu")
WORDS = {" law": 0.5, " code": 0.25, " \n": 0.05}


def config_of(folder, **detect):
    config = data_config(folder, folder, "unused.jsonl")
    model = config.model.model_copy(update={"dtype": "fp32"})
    settings = {"repetition_penalty": 1.0, "max_new_tokens": 12, "batch_size": 64, **detect}
    return config.model_copy(update={"model": model, "detect": config.detect.model_copy(update=settings)})


def generator_of(config):
    return build_generator("transformers", config, load_text_tokenizer(subject(config)), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return unigram_model(tmp_path_factory.mktemp("speaking"), WORDS, end=0.2)


def words_of(texts):
    return Counter(word for text in texts for word in text.text.split())


def test_texts_follow_the_models_probabilities(folder):
    generator = generator_of(config_of(folder, max_new_tokens=60))
    batches = [range(first, first + 128) for first in range(0, 512, 128)]
    texts = [text for number, batch in enumerate(batches) for text in generator.generate(number, batch)]
    assert [text.index for text in texts] == list(range(512))
    assert all(text.finished for text in texts)
    # ends come with 0.2 a token: 4 tokens on average, standard deviation sqrt(20) / sqrt(512) = 0.2
    assert sum(text.num_tokens for text in texts) / 512 == pytest.approx(4.0, abs=0.8)
    words = words_of(texts)
    assert words["law"] / words["code"] == pytest.approx(2.0, rel=0.2)
    assert not any(special in text.text for text in texts for special in ("<bos>", "<eos>"))


def test_a_batch_is_the_same_again_and_others_are_not(folder):
    first, second = generator_of(config_of(folder)), generator_of(config_of(folder))
    second.generate(7, range(3))  # what came before does not matter
    assert first.generate(1, range(64, 128)) == second.generate(1, range(64, 128))
    texts = [[t.text for t in first.generate(batch, range(64))] for batch in (1, 2)]
    assert texts[0] != texts[1]
    other = generator_of(config_of(folder, seed=1)).generate(1, range(64))
    assert [t.text for t in other] != texts[0]
    assert batch_seed(0, 1) != batch_seed(0, 11) != batch_seed(0, 111) and batch_seed(5, 6) < 2**63


def test_settings_of_the_model_folder_do_not_leak_in(folder, tmp_path):
    strange = unigram_model(tmp_path / "strange", WORDS, end=0.2)
    settings = {"top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    GenerationConfig(do_sample=True, **settings).save_pretrained(strange)
    plain, ours = generator_of(config_of(folder)), generator_of(config_of(strange))
    assert [t.text for t in ours.generate(0, range(64))] == [t.text for t in plain.generate(0, range(64))]


def test_each_sampling_setting_does_what_it_says(folder):
    def texts(**settings):
        return generator_of(config_of(folder, **settings)).generate(0, range(64))

    def law_share(**settings):
        words = words_of(texts(**settings))
        return words["law"] / words.total()

    assert law_share(top_k=1) == law_share(top_p=0.4) == 1.0
    assert law_share(temperature=0.3) > 0.8 > law_share() > 0.6 > law_share(temperature=5.0)
    # words become less likely once they were said, ends do not
    repeated = [text.num_tokens for text in texts(repetition_penalty=3.0)]
    assert sum(repeated) < 0.8 * sum(text.num_tokens for text in texts())


def test_texts_that_do_not_end_are_cut_and_say_so(folder, tmp_path):
    endless = unigram_model(tmp_path / "endless", {" law": 1.0}, end=0.0)
    texts = generator_of(config_of(endless, max_new_tokens=5)).generate(0, range(3))
    assert texts == [GeneratedText(i, " law" * 5, 5, finished=False) for i in range(3)]
    assert max_new_tokens(config_of(endless, max_new_tokens=5000).detect, config_of(endless).model) == 127


def test_the_prompt_is_bos_or_else_eos_or_an_error(tmp_path):
    assert prompt_token(word_tokenizer(["a"])) == 0
    assert prompt_token(qwen_like_tokenizer()) == 2  # <|im_end|>, its EOS: there is no BOS
    neither = tmp_path / "neither"
    unigram_model(neither, {" a": 1.0}, end=0.0, bos_token=None, eos_token=None)
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        load_text_tokenizer(config_of(neither).model)


def test_texts_end_at_the_folders_and_the_tokenizers_end_tokens(folder, tmp_path):
    copy = unigram_model(tmp_path / "copy", WORDS, end=0.2)
    GenerationConfig(eos_token_id=[3, 1]).save_pretrained(copy)
    config = config_of(copy)
    tokenizer = load_text_tokenizer(config.model)
    assert end_tokens(config.model, tokenizer) == [1, 3]
    texts = generator_of(config).generate(0, range(64))  # 3 is " law"
    assert not any("law" in text.text for text in texts) and all(text.finished for text in texts)


@pytest.mark.parametrize(
    ("text", "blank"), [("", True), (" \n\t\u3000", True), ("\x00\u200b", True), ("a", False), (" .", False)]
)
def test_blank_is_what_nobody_can_read(text, blank):
    assert GeneratedText(0, text, 1, True).is_blank is blank


def test_a_shape_without_weights_is_an_error_with_a_cure(tmp_path):
    LlamaConfig(vocab_size=64).save_pretrained(tmp_path)
    model = config_of(tmp_path).model
    with pytest.raises(ConfigError, match=r"has no weights.*--model FOLDER.*random"):
        subject_fingerprint(model, seed=0)
    random = model.model_copy(update={"weights": "random"})
    assert subject_fingerprint(random, seed=0) != subject_fingerprint(random, seed=1)


def test_fingerprints_tell_models_apart(folder, tmp_path):
    model = config_of(folder).model
    assert subject_fingerprint(model, 0) == subject_fingerprint(model, 1)
    other = unigram_model(tmp_path / "other", {" law": 0.4, " code": 0.35, " \n": 0.05}, end=0.2)
    assert subject_fingerprint(config_of(other).model, 0) != subject_fingerprint(model, 0)


def test_a_model_that_gives_nan_is_named(folder):
    generator = generator_of(config_of(folder))
    with torch.no_grad():
        generator.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(VersaTuneError, match="not finite"):
        generator.generate(0, range(2))


def test_vllm_is_used_where_it_can_be_and_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: None)
    assert choose_generator("auto", "cuda") == "transformers"
    with pytest.raises(ConfigError, match=r"not installed.*versatune-ds\[vllm\]"):
        choose_generator("vllm", "cuda")
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: object())
    assert choose_generator("auto", "cuda") == choose_generator("vllm", "cpu") == "vllm"
    assert choose_generator("auto", "cpu") == choose_generator("transformers", "cuda") == "transformers"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_generator("auto", "cuda") == "transformers"
    with pytest.raises(ConfigError, match="without a launcher"):
        choose_generator("vllm", "cuda")


def test_what_vllm_is_asked_for(folder, monkeypatch):
    """A stand-in for vLLM: this shows the requests that we make, not that vLLM takes them."""
    asked = {}

    class LLM:
        def __init__(self, **settings):
            asked["settings"] = settings

        def generate(self, prompts, chosen, use_tqdm):
            asked["prompts"], asked["sampling"] = prompts, chosen
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[3, 1])]) for _ in prompts]

    stub = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    config = config_of(folder, temperature=0.7, top_k=0, seed=4)
    generator = build_generator("vllm", config, load_text_tokenizer(config.model), CPU)
    assert generator.generate(0, range(2)) == [GeneratedText(i, " law", 1, finished=True) for i in range(2)]
    assert asked["settings"]["generation_config"] == "vllm" and asked["settings"]["dtype"] == "float32"
    assert asked["prompts"] == [{"prompt_token_ids": [0]}] * 2
    first, second = asked["sampling"]
    assert (first.temperature, first.top_k, first.max_tokens) == (0.7, -1, 12)
    assert first.seed != second.seed and first.stop_token_ids == [1]
