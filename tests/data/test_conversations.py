# ruff: noqa: E501  (templates)
"""Conversations as people have them: roles, parts, tools, thoughts, flags and weights; what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prepared import data_config, qwen_like_tokenizer, write_jsonl

from versatune_ds.data.cache.prepare import prepare
from versatune_ds.data.chat.conversation import Conversation, to_train
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.rows.reasons import BadRow, Reason
from versatune_ds.data.rows.schemas import RowSchema, TokenRow

# As the official templates of Qwen2.5 and Qwen3: tools, calls, results in a user turn, thoughts of the last turns.
AGENT = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content is string and loop.index0 > ns.last %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content or '' }}{%- for call in m.tool_calls or [] %}{{- '\\n' if m.content or not loop.first }}{{- '<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}"
    "{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}{%- endif %}"
)
THINK_STRIPPER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1].strip() + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = THINK_STRIPPER.replace(".split('</think>')[-1].strip()", "")
ARGUMENTS_AS_TEXT = PLAIN.replace(
    "m.content",
    "(m.content or '') + (m.tool_calls[0].function.name + m.tool_calls[0].function.arguments if m.tool_calls else '')",
)
HERMES = "hermes"


def tokenizer(template: str | None = None) -> Any:
    return qwen_like_tokenizer(chat_template=template)


def parse(row: dict[str, Any], **schema: Any) -> Any:
    rules = RowSchema(domain="law", **schema)
    return rules.parse(row, rules.detect(row))


def encode(
    row: dict[str, Any], template: str = AGENT, reasoning: str = "keep", train_on: str = "all_turns"
) -> Any:
    """(encoder, sample), or the BadRow."""
    built_in = template == HERMES or template == "chatml"
    encoder = ChatEncoder.build(
        tokenizer(None if built_in else template), template if built_in else "tokenizer"
    )
    try:
        (sample,) = encoder.encode([to_train(parse(row), reasoning, train_on)])
    except BadRow as error:
        return encoder, error
    return encoder, sample


def trained(*args: Any, **options: Any) -> list[tuple[str, float]]:
    """(text, weight) of each run of equal weight above 0."""
    encoder, sample = encode(*args, **options)
    assert not isinstance(sample, BadRow), sample.message
    weights = (sample.mask if sample.weights is None else sample.weights).astype(float).tolist()
    runs: list[tuple[list[int], float]] = []
    previous = 0.0
    for token, weight in zip(sample.tokens.tolist(), weights, strict=True):
        if weight and weight != previous:
            runs.append(([], weight))
        if weight:
            runs[-1][0].append(token)
        previous = weight
    return [(encoder.backend.decode(run, skip_special_tokens=False), weight) for run, weight in runs]


def texts(*args: Any, **options: Any) -> list[str]:
    return [text.removesuffix("<|im_end|>") for text, _ in trained(*args, **options)]


def whole(*args: Any, **options: Any) -> str:
    encoder, sample = encode(*args, **options)
    assert not isinstance(sample, BadRow), sample.message
    return encoder.backend.decode(sample.tokens.tolist(), skip_special_tokens=False)


def rejected(*args: Any, **options: Any) -> BadRow:
    _, error = encode(*args, **options)
    assert isinstance(error, BadRow)
    return error


def user(content: Any = "Q", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def says(content: Any = "A", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


# --- roles, parts, text ---------------------------------------------------------------------------------------

NAMES = {
    "system": ["system", "System"],
    "developer": ["developer"],
    "user": ["user", "human", "Human", "USER", "prompter", "Human:", "input", "question"],
    "assistant": [
        *("assistant", "Assistant", "gpt", "chatgpt", "bard", "bing", "AI", "model", "bot", "gpt-4"),
        *("gpt-3.5-turbo", "gpt-4o", "GPT_3.5", "gpt4o-mini", "output", "answer"),
    ],
    "tool": [
        "tool",
        "function",
        "ipython",
        "observation",
        "tool_response",
        "tool result",
        "Function-Response",
        "toolResult",
        "environment",
    ],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in NAMES.items() for name in names])
def test_roles_by_all_their_names_in_both_formats(role: str, name: str) -> None:
    for row in (
        {"messages": [{"role": name, "content": "x"}, user(), says()]},
        {
            "conversations": [
                {"from": name, "value": "x"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        },
        {"conversations": [{"role": name, "content": "x"}, user(), says()]},
    ):
        assert parse(row).turns[0][:2] == (role, "x")


def test_a_developer_is_a_system_where_the_template_knows_none() -> None:
    row = chat({"role": "developer", "content": "Be brief."}, user(), says())
    assert "<|im_start|>system\nBe brief.<|im_end|>" in whole(row, PLAIN)
    assert "<|im_start|>developer\nBe brief.<|im_end|>" in whole(row, PLAIN + "{# developer #}")


def test_parts_of_text_are_joined_and_others_refused_by_their_type() -> None:
    parts = [{"type": "text", "text": "One, "}, {"type": "text", "text": "two.", "image": None}, "!"]
    assert parse(chat(user(parts), says([{"type": "text", "text": "A"}]))) == Conversation(
        (("user", "One, two.!"), ("assistant", "A"))
    )
    thinking = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]
    assert parse(chat(user(), says(thinking))).turns[1][:3] == ("assistant", "A", "hm")
    with pytest.raises(BadRow, match=r"messages\[0\].content\[0\] is a part of type 'image_url'"):
        parse(chat(user([{"type": "image_url", "image_url": "x"}]), says()))
    with pytest.raises(BadRow, match=r"messages\[0\].content\[0\].text is missing \(found: type, txt\)"):
        parse(chat(user([{"type": "text", "txt": "x"}]), says()))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}]},
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "reasoning", "text": None, "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}], "summary": None},
    ],
    ids=["Magistral", "plain", "summary", "content"],
)
def test_thoughts_that_are_parts_of_a_turn(part: dict[str, Any]) -> None:
    row = chat(user(), says([part, {"type": "text", "text": "A"}]))
    assert parse(row).turns[1][:3] == ("assistant", "A", "hm")


def test_a_result_that_is_no_text_is_written_as_json() -> None:
    for content, written in ((42, "42"), (True, "true"), ({"t": 3}, '{"t": 3}'), ([1, 2], "[1, 2]")):
        row = chat(user(), says(None, tool_calls=[called()]), {"role": "tool", "content": content}, says())
        assert parse(row).turns[2][:2] == ("tool", written)


def test_tools_that_a_turn_brings_are_the_rows() -> None:
    calls = (user(), says(None, tool_calls=[called()]), RESULT, says("Rain."))
    row = chat({"role": "system", "content": "S", "tools": [TOOL["function"]]}, *calls)
    assert parse(row).tools == parse(row | {"tools": [TOOL]}).tools == (TOOL,)
    assert texts(row, HERMES) == [WRITTEN, "Rain."]


def test_messages_as_json_text_are_read_and_counted() -> None:
    turns = [user("Hi?"), says("Hello.")]
    read = parse({"messages": json.dumps(turns)})
    assert read.turns == parse(chat(*turns)).turns and read.notes == {"json_text"}
    assert parse({"messages": [json.dumps(turn) for turn in turns]}).turns == read.turns
    with pytest.raises(BadRow, match=r"json\.dumps writes it, str does not"):
        parse({"messages": str(turns)})
    read = parse({"prompt": json.dumps(turns[:1]), "completion": json.dumps(turns[1:])})
    assert read.turns == parse(chat(*turns)).turns and read.notes == {"json_text"}
    assert parse({"prompt": "[1, 2]", "completion": "[3]"}).turns[0][:2] == ("user", "[1, 2]")


def test_prompt_and_completion_as_lists_of_messages_train_the_completion() -> None:
    row = {"prompt": [user("Hi?"), says("Yes?"), user("Well?")], "completion": [says("Hello.")]}
    assert texts(row) == ["Hello."]
    assert texts({"prompt": "Hi?", "completion": [says("Hello.")]}) == ["Hello."]


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_system_prompts_in_columns(column: str) -> None:
    row = chat(user(), says(), **{column: "In French."})
    assert parse(row).turns[0][:2] == ("system", "In French.")
    again = chat({"role": "system", "content": "In French."}, user(), says(), **{column: "In French."})
    assert [turn.role for turn in parse(again).turns] == ["system", "user", "assistant"]
    with pytest.raises(BadRow, match="differ"):
        parse(row | {"system": "a", "system_prompt": "b"})


# --- tools ----------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = {"city": "Oslo"}


def called(arguments: Any = ASKED, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


RESULT = {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SHAREGPT = [
    {"from": "human", "value": "Q"},
    {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ASKED})},
    {"from": "observation", "value": "rain"},
    {"from": "gpt", "value": "Rain."},
]


@pytest.mark.parametrize("template", [AGENT, HERMES])
@pytest.mark.parametrize(
    "row",
    [
        chat(user(), says(None, tool_calls=[called()]), RESULT, says("Rain."), tools=[TOOL]),
        chat(user(), says("", tool_calls=[called('{"city": "Oslo"}')]), RESULT, says("Rain."), tools=json.dumps([TOOL])),
        chat(user(), says(tool_calls=[called()]) | {"content": None}, RESULT, says("Rain."), tools=[json.dumps(TOOL)]),
        chat(user(), {"role": "assistant", "tool_calls": json.dumps([called(id="1")])}, RESULT, says("Rain."), tools=[TOOL["function"]]),
        chat(user(), says(None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}), {"role": "function", "content": "rain"}, says("Rain."), functions=[TOOL["function"]]),
        {"conversations": SHAREGPT, "tools": json.dumps([TOOL])},
    ],
    ids=["objects", "arguments as text", "null content", "calls as text", "functions", "sharegpt"],
)  # fmt: skip
def test_calls_are_trained_on_and_results_and_tools_are_context(row: dict[str, Any], template: str) -> None:
    assert texts(row, template) == [WRITTEN, "Rain."]
    assert "<tool_response>\nrain\n</tool_response>" in whole(row, template) and json.dumps(TOOL) in whole(
        row, template
    )


def test_ids_are_those_of_the_tokenizers_own_template() -> None:
    messages = [
        user(),
        says("I look.", tool_calls=[called(), called({"city": "Rom\u00e9"})]),
        RESULT,
        RESULT,
        says("Rain."),
    ]
    _, sample = encode(chat(*messages, tools=[TOOL]))
    own = tokenizer(AGENT).apply_chat_template(messages, tools=[TOOL], tokenize=True, return_dict=False)
    assert sample.tokens.tolist() == own


def test_parallel_calls_in_turns_of_their_own_are_one_turn() -> None:
    twice = [SHAREGPT[0], SHAREGPT[1], SHAREGPT[1], SHAREGPT[2], SHAREGPT[2], SHAREGPT[3]]
    assert texts({"conversations": twice}) == [f"{WRITTEN}\n{WRITTEN}", "Rain."]
    spoken = [SHAREGPT[0], {"from": "gpt", "value": "I look."}, *SHAREGPT[1:]]
    assert texts({"conversations": spoken}) == [f"I look.\n{WRITTEN}", "Rain."]


def test_a_call_that_is_another_text_is_the_response() -> None:
    turns = [SHAREGPT[0], {"from": "function_call", "value": "{}"}, *SHAREGPT[2:]]
    assert texts({"conversations": turns}) == ["{}", "Rain."]


@pytest.mark.parametrize("tools", [None, "[]", [], "", "null", {}])
def test_no_tools(tools: Any) -> None:
    assert parse(chat(user(), says(), tools=tools)).tools == ()


def test_nulls_that_tables_fill_in_are_no_arguments() -> None:
    row = chat(user(), says(None, tool_calls=[called({"city": "Oslo", "unit": None})]), RESULT, says("Rain."))
    rules = RowSchema(domain="law")
    assert rules.parse(row, "messages").turns[1].calls[0]["function"]["arguments"] == {
        "city": "Oslo",
        "unit": None,
    }
    assert rules.parse(row, "messages", drop_nulls=True).turns[1].calls[0]["function"]["arguments"] == ASKED
    for written in (
        {"messages": json.dumps(row["messages"])},
        chat(
            user(), says(None, tool_calls=[called('{"city": "Oslo", "unit": null}')]), RESULT, says("Rain.")
        ),
        chat(
            user(),
            says(None, tool_calls=json.dumps([called({"city": "Oslo", "unit": None})])),
            RESULT,
            says(),
        ),
    ):
        calls = rules.parse(written, "messages", drop_nulls=True).turns[1].calls
        assert calls[0]["function"]["arguments"] == {"city": "Oslo", "unit": None}, (
            "written so, not filled in"
        )
    for tools in ('[{"name": "w", "x": null}]', ['{"name": "w", "x": null}']):
        (tool,) = rules.parse(row | {"tools": tools}, "messages", drop_nulls=True).tools
        assert tool["function"] == {"name": "w", "x": None}


def test_structs_of_lists_are_lists_also_within_turns() -> None:
    call = {"type": ["function"], "function": [called()["function"]]}
    parts = {"type": ["text", "text"], "text": ["Q", "?"]}
    row = chat(user(parts), says(None, tool_calls=call), RESULT, says("Rain."), tools={"name": ["weather"]})
    read = parse(row)
    assert read.turns[0][:2] == ("user", "Q?") and read.turns[1].calls == (called(),)
    assert read.tools == ({"type": "function", "function": {"name": "weather"}},)


def test_arguments_are_text_where_the_template_takes_no_object() -> None:
    row = chat(user(), says(None, tool_calls=[called()]), RESULT, says("Rain."))
    assert texts(row, ARGUMENTS_AS_TEXT)[0] == 'weather{"city": "Oslo"}'


def test_a_turn_of_calls_has_an_empty_text_where_the_template_takes_no_none() -> None:
    template = AGENT.replace(
        "{{- m.content or '' }}", "{%- if '</think>' not in m.content %}{{- m.content }}{%- endif %}"
    )
    assert template != AGENT and "none" in template + "{# none #}"
    row = chat(user(), says(None, tool_calls=[called()]), RESULT, says("Rain."), tools=[TOOL])
    assert texts(row, template + "{# none #}") == [WRITTEN, "Rain."]


def test_tools_and_calls_that_the_template_leaves_out_are_errors() -> None:
    error = rejected(chat(user(), says(), tools=[TOOL]), "chatml")
    assert error.reason == Reason.LOST_TEXT and "'weather'" in error.message and "hermes" in error.message
    error = rejected(chat(user(), says("I look.", tool_calls=[called()]), RESULT, says("Rain.")), "chatml")
    assert error.reason == Reason.LOST_TEXT and "'weather'" in error.message
    assert texts(
        chat(user(), says("I look.", tool_calls=[called()], weight=0), RESULT, says("Rain.")), "chatml"
    ) == ["Rain."]


def test_a_call_without_a_stop_token_trains_no_result() -> None:
    unstopped = AGENT.replace(
        "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}",
        "{{- '<|im_end|>\\n' if loop.last or not m.tool_calls }}{%- endif %}{%- endfor %}",
    )
    assert unstopped != AGENT
    row = chat(user(), says(None, tool_calls=[called()]), RESULT, says("Rain."))
    assert rejected(row, unstopped).reason == Reason.NO_STOP_TOKEN


# --- thoughts -------------------------------------------------------------------------------------------------

THOUGHT = "Two and two make four."
IN_TEXT = chat(user("2 + 2?"), says(f"<think>\n{THOUGHT}\n</think>\n\n4"))
FULL = f"<think>\n{THOUGHT}\n</think>\n\n4"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thoughts_in_fields_are_kept_masked_or_dropped(name: str) -> None:
    row = chat(user("2 + 2?"), says("4", **{name: THOUGHT}))
    for template in (AGENT, HERMES):
        assert texts(row, template) == [FULL]
        assert texts(row, template, reasoning="mask") == ["4"]
        assert THOUGHT in whole(row, template, reasoning="mask")
        assert texts(row, template, reasoning="drop") == ["4"]
        assert THOUGHT not in whole(row, template, reasoning="drop")


def test_the_template_is_given_thoughts_by_the_name_that_it_reads() -> None:
    template = PLAIN.replace("m.content", "('[' + m.thinking + ']' if m.thinking else '') + m.content")
    row = chat(user(), says("4", reasoning_content=THOUGHT))
    assert texts(row, template) == [f"[{THOUGHT}]4"]
    assert texts(row, template, reasoning="mask") == ["[", "]4"]


@pytest.mark.parametrize(
    "content",
    [
        *(FULL, f"{THOUGHT}\n</think>\n\n4", f"<think>{THOUGHT}</think>4", f"[THINK]{THOUGHT}[/THINK]4"),
        *(f"<thought>{THOUGHT}</thought>\n4", f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|>\n4"),
    ],
)
def test_thoughts_in_the_text_are_kept_masked_or_dropped(content: str) -> None:
    row = chat(user("2 + 2?"), says(content))
    assert texts(row, PLAIN) == [content]
    assert texts(row, PLAIN, reasoning="mask") == ["4"]
    assert texts(row, PLAIN, reasoning="drop") == ["4"]


def test_thoughts_that_the_template_cannot_render_are_an_error_with_a_cure() -> None:
    for row, template in ((chat(user(), says("4", reasoning=THOUGHT)), "chatml"), (IN_TEXT, THINK_STRIPPER)):
        error = rejected(row, template)
        assert error.reason == Reason.LOST_TEXT and f"'{THOUGHT}'" in error.message
        assert "data.reasoning: drop" in error.message
        assert texts(row, template, reasoning="drop") == ["4"]


def test_a_turn_that_renders_to_nothing_is_a_bad_row() -> None:
    row = chat(user(), says(f"<think>{THOUGHT}</think>"))
    assert rejected(row, THINK_STRIPPER).reason == Reason.LOST_TEXT
    assert rejected(row, PLAIN, reasoning="drop").reason == Reason.EMPTY_RESPONSE
    nothing = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content if 'A' not in m.content else '') + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    assert rejected(chat(user(), says("A")), nothing).reason == Reason.LOST_TEXT


# --- flags and weights ----------------------------------------------------------------------------------------

OFF = [
    *({name: value} for name in ("weight", "loss", "train", "training", "trainable", "train_on_turn", "loss_mask", "step_loss_mask") for value in (0, False, 0.0, "false", "0")),
    *({name: value} for name in ("masked", "ignore_loss") for value in (1, True, "true")),
    *({name: value} for name in ("lossMask", "loss-mask", "Train", "LOSS", "learn", "supervise", "compute_loss") for value in (0, False, "off")),
    *({name: True} for name in ("isMasked", "mask_loss", "no_train")),
    {"loss": False, "train": False, "loss_mask": 0, "weight": 1},
    {"train": False, "weight": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("flags", OFF, ids=str)
def test_a_turn_switched_off_is_context(flags: dict[str, Any]) -> None:
    wrong, right = (
        says("The Nile is a lake.", **flags),
        says("The Nile is a river.", weight=1, train=True, masked=False),
    )
    assert trained(chat(user(), wrong, user("Again?"), right)) == [("The Nile is a river.<|im_end|>", 1.0)]
    said = [
        {
            "from": "gpt",
            "value": turn["content"],
            **{k: v for k, v in turn.items() if k not in ("role", "content")},
        }
        for turn in (wrong, right)
    ]
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            said[0],
            {"from": "human", "value": "Again?"},
            said[1],
        ]
    }
    assert texts(row) == ["The Nile is a river."]


@pytest.mark.parametrize("name", ["weight", "loss_weight", "loss_scale", "loss_mask"])
def test_fractions_are_weights_of_tokens(name: str) -> None:
    row = chat(user(), says("One.", **{name: 0.5}), user(), says("Two."), user(), says("Three.", **{name: 2}))
    assert trained(row) == [("One.<|im_end|>", 0.5), ("Two.<|im_end|>", 1.0), ("Three.<|im_end|>", 2.0)]


@pytest.mark.parametrize(
    "mask",
    [
        {"loss_mask": [0, 0, 0, 1]}, {"loss_mask": [False, True]}, {"weights": "[0, 0.0, 0, 1.0]"}, {"mask": [0, 0, 0, 1]},
        {"masked": [1, 0]}, {"train_mask": [1, 0, 1, 1]}, {"train": [None, False, None, None]},
        {"lossMask": [0, 1]}, {"message_weights": [0, 0, 0, 1]}, {"turn_loss_mask": "[0, 1]"}, {"supervised": [False, True]},
    ],
    ids=str,
)  # fmt: skip
def test_lists_of_the_row_have_an_entry_for_each_turn_or_answer(mask: dict[str, Any]) -> None:
    assert texts(chat(user(), says("One."), user(), says("Two."), **mask, system="S")) == ["Two."]


def test_a_weight_of_the_row_is_a_factor() -> None:
    row = chat(user(), says("One.", weight=0.5), user(), says("Two."))
    assert [weight for _, weight in trained(row | {"weight": 0.5})] == [0.25, 0.5]
    assert [weight for _, weight in trained({"prompt": "Q", "completion": "A", "sample_weight": 3})] == [3.0]
    renamed = {"columns": {"weight": "score"}}
    assert parse({"prompt": "Q", "completion": "A", "score": 0.5, "weight": 3}, **renamed).weight == 0.5
    for off in ({"weight": 0}, {"train": False}, {"masked": True}):
        assert rejected(row | off).reason == Reason.SWITCHED_OFF


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(user(), says(weight=-1)), Reason.INVALID_LABEL),
        (chat(user(), says(weight=float("nan"))), Reason.INVALID_LABEL),
        (chat(user(), says(masked=0.5)), Reason.INVALID_LABEL),
        (chat(user(), says(weight=0.5, loss_weight=0.7)), Reason.INVALID_LABEL),
        (chat(user(), says(weight="much")), Reason.WRONG_TYPE),
        (chat(user(), says(weight=[1])), Reason.WRONG_TYPE),
        (chat(user(), says(mask=1)), Reason.UNSUPPORTED_FIELD),
        (chat(user(), says(train_on_this=False)), Reason.UNSUPPORTED_FIELD),
        (chat(user(), says(my_loss_flag=0)), Reason.UNSUPPORTED_FIELD),
        (chat(user(), says(), user(), says(), turn_mask=[0, 1]), Reason.UNSUPPORTED_FIELD),
        (chat(user(), says(), mask=[1, 0]), Reason.UNSUPPORTED_FIELD),
        (chat(user(), says(), loss=1.37), Reason.UNSUPPORTED_FIELD),
        (chat(user(), says(), loss_mask=[1, 0, 1]), Reason.LENGTH_MISMATCH),
    ],
)
def test_flags_that_say_nothing_clear_are_refused(row: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(BadRow) as caught:
        parse(row)
    assert caught.value.reason == reason


def test_which_turns_are_trained_on() -> None:
    row = chat(user(), says("One."), user(), says("Two.", train=True), user(), says("Three."))
    assert texts(row) == ["One.", "Two.", "Three."]
    assert texts(row, train_on="last_turn") == ["Three."]
    assert texts(row, train_on="flagged") == ["Two."]
    assert rejected(chat(user(), says()), train_on="flagged").reason == Reason.SWITCHED_OFF
    assert (
        rejected(chat(user(), says(), user(), says(weight=0)), train_on="last_turn").reason
        == Reason.SWITCHED_OFF
    )


@pytest.mark.parametrize("name", ["prefix", "partial", "continue"])
def test_an_open_turn_has_no_stop_token_to_learn(name: str) -> None:
    row = chat(user("Write JSON."), says("{", **{name: True}), user("go on"), says("}"))
    assert trained(row) == [("{", 1.0), ("}<|im_end|>", 1.0)]


@pytest.mark.parametrize("begun", ["<think>\\n", "<think>\\n\\n</think>\\n\\n"])
def test_turns_need_not_have_the_thought_that_the_prompt_begins(begun: str) -> None:
    """As Qwen3's thinking models: earlier turns are written without one."""
    template = PLAIN.replace("<|im_start|>assistant\\n", f"<|im_start|>assistant\\n{begun}")
    assert template != PLAIN
    assert texts(chat(user(), says("One."), user(), says("Two.")), template) == ["One.", "Two."]
    thought = f"<think>\n{THOUGHT}\n</think>\n\n4"
    trained_on = thought if "/" in begun else thought.removeprefix("<think>\n")
    assert texts(chat(user(), says("One."), user(), says(thought)), template) == ["One.", trained_on]


def test_variables_of_the_row_reach_the_template() -> None:
    thought_off = chat(user("2 + 2?"), says("4"), chat_template_kwargs={"enable_thinking": False})
    template = AGENT.replace(
        "{{- m.content or '' }}",
        "{{- '<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and enable_thinking is defined and not enable_thinking }}{{- m.content or '' }}",
    )
    for row in (
        thought_off,
        chat(user("2 + 2?"), says("4"), enable_thinking=False),
        thought_off | {"chat_template_kwargs": '{"enable_thinking": false}'},
    ):
        assert "<think>\n\n</think>\n\n4" in whole(row, template) and texts(row, template) == ["4"]
    assert texts(thought_off) == ["4"]  # its prompt holds an empty thought, the turn does not
    with pytest.raises(BadRow, match="messages"):
        parse(chat(user(), says(), chat_template_kwargs={"messages": []}))


# --- ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[5, 6, 2, 2, 2], [5, 6, 2, 0], [5, 6, 2, 0, 0], [0, 0, 5, 6, 2], [5, 2, 2]])
def test_padding_without_a_mask_is_refused(ids: list[int]) -> None:
    encoder = ChatEncoder.build(tokenizer(PLAIN), "tokenizer")
    labels = (
        [-100] * (len(ids) - 1) + [ids[-1]]
        if ids == [5, 2, 2]
        else [-100, *ids[1:3], *[-100] * (len(ids) - 3)]
    )
    with pytest.raises(BadRow, match="which is padding"):
        encoder.check_tokens(parse({"input_ids": ids, "labels": labels}))
    assert encoder.check_tokens(
        parse({"input_ids": [0, 5, 6, 2], "labels": [-100, 5, 6, 2]})
    ).tokens.tolist() == [0, 5, 6, 2]


@pytest.mark.parametrize("name", ["supervised_mask", "loss_mask", "assistant_masks", "completion_mask"])
def test_weights_of_ids(name: str) -> None:
    assert parse({"input_ids": "[5, 6]", name: "[0, 1]"}).mask.tolist() == [False, True], "cells of a CSV"
    row = parse({"input_ids": [5, 6, 7], name: [0, 0.5, 1], "weight": 2})
    assert isinstance(row, TokenRow) and row.weights is not None
    assert row.mask.tolist() == [False, True, True] and row.weights.tolist() == [0, 1, 2]
    assert parse({"input_ids": [5, 6], name: [0, 1]}).weights is None
    for other in ("weights", "mask", "lossWeights"):
        with pytest.raises(
            BadRow, match=f"{other} is a list; weights of tokens are read from supervised_mask"
        ):
            parse({"input_ids": [5, 6], name: [0, 1], other: [0, 0.5]})


# --- the cache ------------------------------------------------------------------------------------------------


def test_a_cache_has_weights_only_where_rows_have_some(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    plain = [chat(user(), says(f"answer {i}")) for i in range(3)]
    weighted = [*plain, chat(user(), says("One.", weight=0.5), user(), says("Two.")), plain[0]]
    caches = []
    for i, rows in enumerate((plain, weighted)):
        config = data_config(tmp_path, tmp_path / "tokenizer", write_jsonl(tmp_path / f"{i}.jsonl", rows))
        caches.append(prepare(config, progress=False).caches["train"][0])
    without, having = caches
    assert without is not None and having is not None
    assert without.weight_sums is None and "weights.bin" not in without.manifest["files"]
    assert without.sample(0)[1].dtype == bool
    having.verify(full=True)
    assert having.weight_sums is not None
    assert having.weight_sums.tolist() == [float(having.sample(i)[1][1:].sum()) for i in range(5)]
    assert having.weight_sums[:3].tolist() == having.supervised[:3].tolist()
    assert sorted(set(having.sample(3)[1].tolist())) == [0.0, 0.5, 1.0]
    assert having.sample(0)[1].tolist() == without.sample(0)[1].astype(float).tolist()


def test_fields_of_turns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    turns = [user(name="Bob", id=None), says(constraint=0, good=True, weight=1, thinking="", tool_calls=[])]
    path = write_jsonl(tmp_path / "d.jsonl", [chat(*turns), chat(user("R", name="Eve"), says())])
    report = prepare(data_config(tmp_path, tmp_path / "tokenizer", path), progress=False)
    (said,) = [line for line in report.table().splitlines() if "not used" in line]
    assert (
        said == "note: train law: columns not used: messages[].constraint, messages[].good, messages[].name"
    )


def test_what_is_not_plain_is_counted(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [
        chat(
            user(), says(weight=0), user(weight=1), says(weight=2), chat_template_kwargs={"no_such_thing": 1}
        ),
        {"messages": json.dumps([user(), says()])},
        chat(user(), says(weight=0)),
    ]
    report = prepare(
        data_config(tmp_path, tmp_path / "tokenizer", write_jsonl(tmp_path / "d.jsonl", rows)), progress=False
    )
    for note in (
        "1 with messages as JSON text",
        "1 with weights other than 0 and 1",
        "1 with assistant turns that are context only",
        "1 with weights on turns",
        "1 with chat_template_kwargs",
        "switched_off",
    ):
        assert note in report.table()
