"""The local judge: log-probabilities of whole names in batches are those of plain forwards, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prepared import qwen_like_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from versatune_ds.apps.detect.local_model import CONTENT_FREE, ModelJudge, log_prior, name_log_probabilities
from versatune_ds.config.model import Model
from versatune_ds.foundations.errors import ConfigError

NAMES = ["law", "capital of France", "prime"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(1)
    tokenizer = qwen_like_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=512, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def judge_of(folder, names=NAMES):
    judge = ModelJudge(names, Model(source=str(folder), dtype="fp32"), 2, CPU)
    judge.open()
    return judge


def plain_log_probability(model, prompt, answer):
    """The definition: one row, no cache, no padding."""
    with torch.inference_mode():
        logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_batched_names_equal_plain_forwards(folder, positions):
    model = judge_of(folder).model
    if positions == "learned":  # padding in front must not move a row's positions
        torch.manual_seed(2)
        config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        model = GPT2LMHeadModel(config).eval()
    prompts = [[5, 9, 200, 31, 7], [4], [300, 20, 11]]
    answers = [[[17], [40, 41, 42], [8, 9]], [[1, 2, 3, 4], [5], [6]], [[7, 7], [7], [7, 7, 7]]]
    found = name_log_probabilities(model, prompts, answers)
    expected = [
        [plain_log_probability(model, prompt, answer) for answer in row]
        for prompt, row in zip(prompts, answers, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    single = name_log_probabilities(model, prompts[:1], [[[17], [40]]])
    np.testing.assert_allclose(
        single, [[plain_log_probability(model, prompts[0], [t]) for t in (17, 40)]], atol=2e-5
    )


def test_a_judgement_does_not_depend_on_its_neighbours(folder):
    judge = judge_of(folder)
    texts = [(3, "What is the capital?"), (4, "Seven is a prime number, and so is eleven. " * 2)]
    both = {j.index: j for j in judge.judge(texts)}
    for text in texts:
        (alone,) = judge.judge([text])
        np.testing.assert_allclose(alone.probabilities, both[text[0]].probabilities, atol=1e-5)
        assert alone.probabilities.sum() == pytest.approx(1) and 0 < alone.name_mass < 1
    assert both[3].name_mass != pytest.approx(both[4].name_mass, rel=0.1)


def test_what_is_said_of_nothing_is_taken_off_by_hand(folder, monkeypatch):
    # of nothing: (0.8, 0.2) and (0.6, 0.4) among the names, whatever the mass on names is; mean (0.7, 0.3)
    nothing = np.log([[0.4, 0.1], [0.06, 0.04]])
    np.testing.assert_allclose(np.exp(log_prior(nothing)), [0.7, 0.3])
    judge = judge_of(folder)
    assert judge.identity()["calibrated_on"] == list(CONTENT_FREE)
    prior = judge.facts()["prior_taken_off"]
    assert list(prior) == NAMES and sum(prior.values()) == pytest.approx(1)
    np.testing.assert_allclose(judge.log_prior, log_prior(judge._name_logs(["", "N/A", "[MASK]"])), atol=1e-6)
    judge.log_prior = np.log([0.7, 0.2, 0.1])
    monkeypatch.setattr(judge, "_name_logs", lambda texts: np.log([[0.35, 0.1, 0.05]]))
    (found,) = judge.judge([(0, "a text")])  # 0.35 / 0.7 = 0.1 / 0.2 = 0.05 / 0.1: nothing beyond the prior
    np.testing.assert_allclose(found.probabilities, [1 / 3, 1 / 3, 1 / 3])
    assert found.name_mass == pytest.approx(0.5)


def test_it_is_asked_in_the_tokenizers_own_template_where_there_is_one(folder, tmp_path):
    judge = judge_of(folder)
    assert judge.facts()["asked_as"] == "plain text"
    prompt, answers = judge._encode("some text")
    assert judge.tokenizer.decode(prompt).endswith("\n\nDomain:")
    assert [judge.tokenizer.decode(ids) for ids in answers] == [f" {name}" for name in NAMES]
    judge.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant{{ '\n' }}"
    )
    assert judge.facts()["asked_as"] == "chat"
    prompt, answers = judge._encode("some text")
    assert judge.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert [judge.tokenizer.decode(ids) for ids in answers] == NAMES


def test_a_text_too_long_for_the_judge_and_a_judge_without_weights_are_errors(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"512 positions; lower detect\.judge\.max_chars"):
        list(judge_of(folder).judge([(0, "zq " * 400)]))
    LlamaConfig(vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no weights"):
        ModelJudge(NAMES, Model(source=str(tmp_path)), 2, CPU)


def test_probabilities_that_are_not_finite_are_counted_and_not_guessed(folder):
    judge = judge_of(folder)
    with torch.no_grad():
        judge.model.lm_head.weight.fill_(float("nan"))
    (judgement,) = judge.judge([(0, "text")])
    assert judgement.probabilities is None and "not finite" in judgement.problem
