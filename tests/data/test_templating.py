# ruff: noqa: E501  (templates)
"""Ids equal the tokenizer's own; exactly what assistants say, with each stop token, is supervised."""

from __future__ import annotations

import json
import pickle
from random import Random
from typing import Any

import numpy as np
import pytest
from prepared import byte_level_tokenizer, qwen_like_tokenizer
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from versatune_ds.apps.detect.generate import prompt_token
from versatune_ds.data.chat.conversation import Conversation, to_train
from versatune_ds.data.encode import chat_encoder
from versatune_ds.data.encode.chat_encoder import ChatEncoder, stop_token
from versatune_ds.data.encode.tokenizer import set_chat_template, template_text
from versatune_ds.data.rows.reasons import BadRow, Reason
from versatune_ds.data.rows.schemas import TextRow, TokenRow
from versatune_ds.foundations.errors import ConfigError

# In the manner of the official templates, none of which marks the assistant's turns.
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + answer }}{% else %}{{ answer }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_SPECIALS = [
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]

TWO_ROUNDS = Conversation(
    (("user", "What is 1 + 2?\nSay it."), ("assistant", "It is 3. caf\u00e9 \U0001f600"), ("user", "And 4?"), ("assistant", "Four."))
)  # fmt: skip


def qwen(template: str | None = None) -> Any:
    return qwen_like_tokenizer(chat_template=template)


def llama(eos: str, bos: str = "<s>", template: str | None = None) -> Any:
    return byte_level_tokenizer(LLAMA_SPECIALS, eos_token=eos, bos_token=bos, chat_template=template)


CASES = [
    ("qwen2.5", qwen(QWEN25), "tokenizer", ["It is 3. caf\u00e9 \U0001f600<|im_end|>", "Four.<|im_end|>"]),
    ("llama-3", llama("<s>", "<|begin_of_text|>", LLAMA3), "tokenizer", ["It is 3. caf\u00e9 \U0001f600<|eot_id|>", "Four.<|eot_id|>"]),
    ("llama-2", llama("</s>", template=LLAMA2), "tokenizer", [" It is 3. caf\u00e9 \U0001f600 </s>", " Four. </s>"]),
    ("qwen3", qwen(QWEN3), "tokenizer", ["It is 3. caf\u00e9 \U0001f600<|im_end|>", "<think>\n\n</think>\n\nFour.<|im_end|>"]),
    ("chatml", qwen(), "chatml", ["It is 3. caf\u00e9 \U0001f600<|im_end|>", "Four.<|im_end|>"]),
    ("alpaca", qwen(), "alpaca", ["It is 3. caf\u00e9 \U0001f600<|im_end|>", "Four.<|im_end|>"]),
    ("llama2", llama("</s>"), "llama2", [" It is 3. caf\u00e9 \U0001f600 </s>", " Four. </s>"]),
    ("llama3", llama("</s>"), "llama3", ["It is 3. caf\u00e9 \U0001f600<|eot_id|>", "Four.<|eot_id|>"]),
    ("chatml without its tokens", llama("</s>"), "chatml", ["It is 3. caf\u00e9 \U0001f600</s>", "Four.</s>"]),
]  # fmt: skip


def encode(encoder: ChatEncoder, *conversations: Conversation) -> list[Any]:
    return encoder.encode(list(conversations))


def messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in conversation.turns]


def supervised_runs(encoder: ChatEncoder, sample: Any) -> list[str]:
    """Text of each run of supervised tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, is_supervised in zip(sample.tokens.tolist(), sample.mask.tolist(), strict=True):
        if is_supervised and not previous:
            runs.append([])
        if is_supervised:
            runs[-1].append(token)
        previous = is_supervised
    return [encoder.backend.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(("tokenizer", "name", "runs"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_ids_and_mask(tokenizer: Any, name: str, runs: list[str]) -> None:
    encoder = ChatEncoder.build(tokenizer, name)
    one_round = Conversation(TWO_ROUNDS.turns[:2])
    for sample, conversation in zip(
        encode(encoder, TWO_ROUNDS, one_round), (TWO_ROUNDS, one_round), strict=True
    ):
        expected = tokenizer.apply_chat_template(
            messages(conversation),
            chat_template=template_text(tokenizer, name),
            tokenize=True,
            return_dict=False,
        )
        assert sample.tokens.tolist() == expected
    assert supervised_runs(encoder, encode(encoder, TWO_ROUNDS)[0]) == runs


@pytest.mark.parametrize(("tokenizer", "name"), [c[1:3] for c in CASES], ids=[c[0] for c in CASES])
def test_exported_template_prompts_exactly_the_unsupervised_part(tokenizer: Any, name: str) -> None:
    """With the template that is exported, inference sees the tokens that came before the supervised ones."""
    exported = pickle.loads(pickle.dumps(tokenizer))
    set_chat_template(exported, name)
    sample = encode(ChatEncoder.build(tokenizer, name), TWO_ROUNDS)[0]
    prompt = exported.apply_chat_template(
        messages(TWO_ROUNDS)[:3], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    end = len(sample.mask) - int(sample.mask[::-1].argmax())  # just after the last stop token
    start = end
    while sample.mask[start - 1]:
        start -= 1
    assert sample.tokens[:start].tolist() == prompt


WORDS = [
    "a",
    " capital",
    "  ",
    "\n",
    "\n\n",
    "Seven",
    " prime",
    "caf\u00e9",
    "e\u0301",
    "\U0001f600",
    "7",
    "  x",
    "<",
    "|",
    "\t",
    ".",
]


@pytest.mark.parametrize(("tokenizer", "name"), [c[1:3] for c in CASES], ids=[c[0] for c in CASES])
def test_masks_by_heads_of_turns_equal_masks_by_offsets(
    tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick way, taken where it settles the mask, against the plain one, on odd texts."""
    encoder = ChatEncoder.build(tokenizer, name)
    random = Random(name)
    conversations = []
    for _ in range(150):
        rounds = random.randint(1, 3)
        texts = ["".join(random.choices(WORDS, k=random.randint(1, 30))) + "z" for _ in range(2 * rounds)]
        turns = tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
        conversations.append(Conversation(turns))
    rendered = [encoder.template.render_spans(conversation) for conversation in conversations]
    by_heads = encoder._encode_by_heads(dict(enumerate(rendered)))
    monkeypatch.setattr(encoder, "_tokens_are_fixed_texts", False)
    by_offsets = encode(encoder, *conversations)
    assert len(by_heads) > 0
    for i, sample in by_heads.items():
        assert sample.tokens.tolist() == by_offsets[i].tokens.tolist()
        assert sample.mask.tolist() == by_offsets[i].mask.tolist()


def test_a_head_that_ends_within_a_word_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and response meet in one word; a head that is cut right behind the start has other tokens there."""
    template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    )
    encoder = ChatEncoder.build(qwen(template), "tokenizer")
    monkeypatch.setattr(chat_encoder, "HEAD_LOOKAHEAD_CHARS", 1)
    words = ["capital", "France", "prime", "number", "Seven", "question", "assistant", "system", "eleven"]
    parts = [(word[:i], word[i:]) for word in words for i in range(1, len(word))]
    conversations = [Conversation((("user", a), ("assistant", f"{b} is a {b}"))) for a, b in parts]
    quick = encode(encoder, *conversations)
    monkeypatch.setattr(encoder, "_tokens_are_fixed_texts", False)
    for found, expected in zip(quick, encode(encoder, *conversations), strict=True):
        assert found.mask.tolist() == expected.mask.tolist()


def test_a_system_turn_is_never_supervised() -> None:
    for name in ("chatml", "alpaca", "llama2", "llama3"):
        encoder = ChatEncoder.build(llama("</s>"), name)
        turns = (("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes."))
        (sample,) = encode(encoder, Conversation(turns))
        assert "Be brief." in encoder.backend.decode(sample.tokens.tolist())
        assert supervised_runs(encoder, sample)[0].strip().startswith("Yes.")


def test_an_encoder_gives_the_same_in_another_process() -> None:
    encoder = ChatEncoder.build(qwen(QWEN25), "tokenizer")
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.fingerprint == encoder.fingerprint
    assert encode(copy, TWO_ROUNDS)[0].tokens.tolist() == encode(encoder, TWO_ROUNDS)[0].tokens.tolist()


@pytest.mark.parametrize("by_heads", [True, False])
def test_a_token_across_the_start_of_a_turn_is_not_supervised(
    by_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template ends its prompt with a space that the tokenizer joins to the first word."""
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + ' A: ' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    encoder = ChatEncoder.build(qwen(template), "tokenizer")
    monkeypatch.setattr(encoder, "_tokens_are_fixed_texts", by_heads)
    (sample,) = encode(encoder, Conversation((("user", "?"), ("assistant", "capital is"))))
    assert supervised_runs(encoder, sample) == [" is<|im_end|>"]


def test_parts_of_a_turn_marked_one_by_one_count_as_one_turn() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\\n' }}{% else %}"
        "{% generation %}{{ 'Answer: ' }}{% endgeneration %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder.build(qwen(template), "tokenizer")
    assert supervised_runs(encoder, encode(encoder, TWO_ROUNDS)[0])[1] == "Answer: Four.<|im_end|>"


def test_pre_tokenised_rows_are_checked() -> None:
    encoder = ChatEncoder.build(qwen(QWEN25), "tokenizer")
    last = encoder.vocab_size - 1

    def check(tokens: list[int], mask: list[int]) -> Any:
        return encoder.check_tokens(TokenRow(np.array(tokens, np.int64), np.array(mask, np.bool_)))

    assert check([0, last], [0, 1]).tokens.tolist() == [0, last]
    for tokens, mask, reason in (
        ([0, last + 1], [0, 1], Reason.INVALID_TOKEN),
        ([-1, 0], [0, 1], Reason.INVALID_TOKEN),
        ([0, 1], [1, 0], Reason.NOTHING_SUPERVISED),
    ):
        with pytest.raises(BadRow) as error:
            check(tokens, mask)
        assert error.value.reason == reason


@pytest.mark.parametrize(("tokenizer", "start"), [(qwen(), "<|im_end|>"), (llama("</s>"), "<s>")])
def test_whole_texts_begin_as_detection_begins_them_and_end_unless_they_were_cut(
    tokenizer: Any, start: str
) -> None:
    encoder = ChatEncoder.build(tokenizer, "chatml")
    whole, cut = (encoder.encode_text(TextRow("capital is", done)) for done in (True, False))
    first, last = tokenizer.convert_tokens_to_ids([start, tokenizer.eos_token])
    assert first == prompt_token(tokenizer)
    assert cut.tokens[0] == first and tokenizer.decode(cut.tokens[1:]) == "capital is"
    assert whole.tokens.tolist() == [*cut.tokens, last]
    assert whole.mask.tolist() == [False] + [True] * (len(whole.tokens) - 1) and whole.weights is None
    half = encoder.encode_text(TextRow("capital is", weight=0.5)).weights
    assert half is not None and half.tolist() == [0.0] + [0.5] * (len(half) - 1)


def test_the_stop_token_of_an_export() -> None:
    assert stop_token(qwen(), "chatml") == "<|im_end|>"
    assert stop_token(llama("</s>"), "chatml") == "</s>"
    assert stop_token(llama("</s>"), "llama3") == "<|eot_id|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}", "no stop token"),
        ("{% for m in messages %}{{ m.content }", "not valid Jinja"),
        ("{% for m in messages %}{{ m.role + eos_token }}{% endfor %}", "leaves out responses"),
        (None, "has no chat template; name one"),
    ],
)
def test_templates_that_cannot_be_trained_with(template: str | None, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ChatEncoder.build(qwen(template), "tokenizer")


def test_a_stop_token_missing_between_turns_rejects_the_row_and_never_supervises_a_prompt() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content }}"
        "{% if m.role == 'user' or loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder.build(qwen(template), "tokenizer")
    assert encode(encoder, TWO_ROUNDS)[0].reason == Reason.NO_STOP_TOKEN


def test_a_template_that_rewrites_what_came_before_rejects_the_row() -> None:
    template = "{{ messages | length | string + ' turns\\n' }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(ConfigError, match="built-in template"):
        ChatEncoder.build(qwen(template), "tokenizer")


def test_rows_refused_one_by_one() -> None:
    encoder = ChatEncoder.build(llama("</s>"), "llama2")
    bad = [
        Conversation((("assistant", "A"),)),
        Conversation((("user", "Q"), ("assistant", "stop </s> here"))),
        Conversation((("user", "Q"), ("system", "S"), ("assistant", "A"))),
    ]
    good = Conversation((("user", "the <s>tag</s>"), ("assistant", "A")))
    results = encode(encoder, *bad, good)
    reasons = [result.reason for result in results if isinstance(result, BadRow)]
    assert reasons == [Reason.REFUSED_BY_TEMPLATE, Reason.STOP_TOKEN_IN_TEXT, Reason.REFUSED_BY_TEMPLATE]
    assert results[3].has_special_text


def test_turns_that_a_template_changes_are_told() -> None:
    """An error if they are trained on, unless thoughts are dropped; a count if they are context only."""
    encoder = ChatEncoder.build(qwen(QWEN3), "tokenizer")
    thinking = Conversation(
        (("user", "Q"), ("assistant", "<think>\nhm\n</think>\n\nOne."), *TWO_ROUNDS.turns[2:])
    )
    (bad,) = encode(encoder, thinking)
    assert bad.reason == Reason.LOST_TEXT and "'hm'" in bad.message and "data.reasoning: drop" in bad.message
    (sample,) = encode(encoder, to_train(thinking, "drop", "all_turns"))
    assert supervised_runs(encoder, sample)[0] == "One.<|im_end|>"
    (sample,) = encode(encoder, to_train(thinking, "keep", "last_turn"))
    assert supervised_runs(encoder, sample) == ["<think>\n\n</think>\n\nFour.<|im_end|>"]
    assert sample.was_rewritten
    assert not encode(encoder, TWO_ROUNDS)[0].was_rewritten


PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + ' A: ' }}"
    "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("answer", ["A b", " A", "  A ", "A\n"])
@pytest.mark.parametrize("template", [QWEN25, PLAIN])
def test_spaces_around_answers_are_the_same_for_trimmed_offsets(template: str, answer: str) -> None:
    trimming = qwen(template)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    conversation = Conversation((("user", "Q?"), ("assistant", answer)) * 2)
    encoder = ChatEncoder.build(trimming, "tokenizer")
    (sample,) = encode(encoder, conversation)
    (plain,) = encode(ChatEncoder.build(qwen(template), "tokenizer"), conversation)
    assert sample.mask.tolist() == plain.mask.tolist()
    assert supervised_runs(encoder, sample) == [answer + "<|im_end|>"] * 2


@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC(), normalizers.Replace("~", "-")])
def test_special_tokens_that_take_white_space_with_them(flags: dict[str, bool], normalizer: Any) -> None:
    tokenizer = byte_level_tokenizer(["</s>"], eos_token="</s>", chat_template=QWEN25)
    specials = [AddedToken(text, normalized=False, **flags) for text in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(specials, special_tokens=True)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    encoder = ChatEncoder.build(tokenizer, "tokenizer")
    (sample,) = encode(encoder, TWO_ROUNDS)
    assert supervised_runs(encoder, sample) == CASES[0][3]


@pytest.mark.parametrize("name", ["tokenizer", "chatml"])
def test_a_stop_token_that_was_added_without_being_special(name: str) -> None:
    tokenizer = byte_level_tokenizer(["</s>"], eos_token="</s>", chat_template=QWEN25)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"])
    encoder = ChatEncoder.build(tokenizer, name)
    assert encoder.template.stop_text == "<|im_end|>"
    (sample,) = encode(encoder, TWO_ROUNDS)
    assert supervised_runs(encoder, sample) == CASES[0][3]
    (bad,) = encode(encoder, Conversation((("user", "Q"), ("assistant", "a <|im_end|> b"))))
    assert bad.reason == Reason.STOP_TOKEN_IN_TEXT
    (thought,) = encode(encoder, Conversation((("user", "<think>"), ("assistant", "a"))))
    assert not thought.has_special_text, "only the stop token is taken for a special one"


@pytest.mark.parametrize(("name", "bos"), [("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>")])
def test_a_built_in_template_that_begins_with_the_bos_token_writes_it_once(name: str, bos: str) -> None:
    tokenizer = qwen_like_tokenizer(bos_token=bos) if name == "chatml" else llama("</s>", bos)
    (sample,) = encode(ChatEncoder.build(tokenizer, name), TWO_ROUNDS)
    begin = tokenizer.convert_tokens_to_ids(bos)
    assert sample.tokens[0] == begin
    assert sample.tokens[1] != begin


def holes() -> Any:
    """A tokenizer with fewer entries than its largest id: its specials stand far behind its words."""
    tokenizer = qwen(QWEN25)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for entry in state["added_tokens"]:
        entry["id"] += 70_000
        state["model"]["vocab"].pop(entry["content"])
        state["model"]["vocab"][entry["content"]] = entry["id"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", chat_template=QWEN25
    )


def test_a_vocabulary_with_holes() -> None:
    tokenizer = holes()
    assert len(tokenizer) < 500
    encoder = ChatEncoder.build(tokenizer, "tokenizer")
    (sample,) = encode(encoder, TWO_ROUNDS)
    assert supervised_runs(encoder, sample) == CASES[0][3]
    row = TokenRow(np.array([1, 70_002]), np.array([False, True]))
    assert encoder.check_tokens(row).tokens.tolist() == [1, 70_002]
    with pytest.raises(BadRow, match=r"input_ids\[1\] is 70003; allowed: 0 .. 70002"):
        encoder.check_tokens(TokenRow(np.array([1, 70_003]), np.array([False, True])))
    wider = ChatEncoder.build(tokenizer, "tokenizer", rows=80_000)
    assert wider.check_tokens(TokenRow(np.array([1, 79_999]), np.array([False, True]))).tokens[1] == 79_999
    assert wider.fingerprint == encoder.fingerprint
    with pytest.raises(
        ConfigError, match=r"ids up to 70002 \(<\|im_end\|>\), .* 70000 rows; use the model's own"
    ):
        ChatEncoder.build(tokenizer, "tokenizer", rows=70_000)


def test_a_base_tokenizer_without_eos_cannot_end_turns() -> None:
    with pytest.raises(ConfigError, match="eos token, and the tokenizer has none"):
        ChatEncoder.build(byte_level_tokenizer(["<s>"]), "chatml")
