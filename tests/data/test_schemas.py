"""Rows of every format become the same conversation; whatever else they hold has a reason."""

from __future__ import annotations

from typing import Any

import pytest

from versatune_ds.data.chat.conversation import Conversation
from versatune_ds.data.rows.reasons import BadRow, Reason
from versatune_ds.data.rows.schemas import RowSchema, TextRow, TokenRow

TURNS = (("system", "S"), ("user", "Q"), ("assistant", "A"))


def parse(row: dict[str, Any], file_format: str | None = None, **schema: Any) -> Any:
    rules = RowSchema(domain="law", **schema)
    return rules.parse(row, file_format or rules.detect(row))


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def said(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [turn(role, content) for role, content in TURNS], "prompt": "ignored"},
        {"messages": {"role": [role for role, _ in TURNS], "content": ["S", "Q", "A"]}},
        {"conversations": {"value": ["Q", "A"], "from": ["human", "gpt"]}, "system": "S"},
        {"conversations": [said("system", "S"), said("human", "Q"), said("gpt", "A")]},
        {"conversations": [said("user", "Q"), said("assistant", "A")], "system": "S"},
        {"instruction": "Q", "output": "A", "system": "S"},
        {"instruction": "Q", "input": "", "output": "A", "system": "S"},
        {"instruction": "Q", "input": "\u200b", "output": "A", "system": "S"},
        {"instruction": "", "input": "Q", "output": "A", "system": "S", "text": "ignored"},
        {"prompt": "Q", "completion": "A", "system": "S"},
    ],
)  # fmt: skip
def test_formats_are_told_apart_and_give_one_conversation(row: dict[str, Any]) -> None:
    assert parse(row) == Conversation(TURNS)


def test_alpaca_input_follows_the_instruction() -> None:
    row = parse({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert row.turns[0][:2] == ("user", "Add.\n\n1, 2")


def test_rounds_before_the_prompt_are_turns() -> None:
    before = ("user", "q"), ("assistant", "a")
    for row in (
        {"instruction": "Q", "output": "A", "history": [["q", "a"]]},
        {"prompt": "Q", "completion": "A", "history": '[["q", "a"]]'},
    ):
        assert parse(row | {"system": "S"}) == Conversation((TURNS[0], *before, *TURNS[1:]))
        assert parse(row | {"history": [], "system": "S"}) == Conversation(TURNS)


def test_thoughts_in_a_column_belong_to_the_response() -> None:
    row = {"Question": "Q", "Complex_CoT": "hm", "Response": "A"}
    columns = {"prompt": "Question", "reasoning_content": "Complex_CoT", "completion": "Response"}
    assert parse(row, columns=columns).turns[1][:3] == ("assistant", "A", "hm")
    assert parse({"instruction": "Q", "reasoning_content": "hm", "output": "A"}).turns[1].reasoning == "hm"


def test_columns_are_mapped_also_inside_turns() -> None:
    assert parse({"q": "Q", "a": "A"}, columns={"prompt": "q", "completion": "a"}).turns[1][:2] == (
        "assistant",
        "A",
    )
    row = {"chat": [{"who": "user", "says": "Q"}, {"who": "assistant", "says": "A"}]}
    columns = {"messages": "chat", "role": "who", "content": "says"}
    assert parse(row, columns=columns) == Conversation(TURNS[1:])


def test_pretokenized_rows_by_labels_or_mask() -> None:
    by_labels = parse({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    by_mask = parse(
        {"input_ids": [5, 6, 7], "supervised_mask": [False, True, 1], "attention_mask": [1, True, 1]}
    )
    assert isinstance(by_labels, TokenRow)
    assert by_labels.tokens.tolist() == by_mask.tokens.tolist() == [5, 6, 7]
    assert by_labels.mask.tolist() == by_mask.mask.tolist() == [False, True, True]


def test_whole_texts_are_read_when_they_are_named_and_never_guessed() -> None:
    line = {"index": 3, "text": "Once.", "num_tokens": 2, "finished": False}  # of `detect`
    assert parse(line, format="text") == TextRow("Once.", is_finished=False)
    assert parse({"text": "Once."}, format="text") == TextRow("Once.")
    assert parse({"body": "Once.", "weight": 0.5}, format="text", columns={"text": "body"}) == TextRow(
        "Once.", weight=0.5
    )
    mapped = parse({"body": "Once.", "w": 0.5}, format="text", columns={"text": "body", "weight": "w"})
    assert mapped == TextRow("Once.", weight=0.5)
    assert RowSchema(domain="law").detect(line) is None
    for row, reason, message in [
        ({"text": " \n"}, Reason.BLANK_TEXT, "empty"),
        ({"text": 3}, Reason.WRONG_TYPE, "a string"),
        ({"text": "A", "finished": "no"}, Reason.WRONG_TYPE, "true or false"),
        ({"text": "A", "weight": 0}, Reason.SWITCHED_OFF, "weight 0"),
    ]:
        with pytest.raises(BadRow, match=message) as error:
            parse(row, format="text")
        assert error.value.reason == reason
    with pytest.raises(BadRow, match="need `format: text`"):
        RowSchema(domain="law").parse(line, None)


ANSWER = turn("assistant", "A")
CHAT = [turn("user", "Q"), ANSWER]
PADDED = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
CALL = {"type": "function", "function": {"name": "w", "arguments": {}}}
BAD_ROWS: list[tuple[dict[str, Any], Reason]] = [
    ({"instruction": "Q"}, Reason.MISSING_FIELD),
    ({"question": "Q"}, Reason.MISSING_FIELD),
    ({}, Reason.MISSING_FIELD),
    ({"instruction": "Q", "output": None}, Reason.NULL_FIELD),
    ({"instruction": "Q", "output": ""}, Reason.EMPTY_RESPONSE),
    ({"instruction": "Q", "output": " \n\t"}, Reason.EMPTY_RESPONSE),
    ({"instruction": "Q", "output": "\u200b"}, Reason.EMPTY_RESPONSE),
    ({"instruction": "", "input": " ", "output": "A"}, Reason.EMPTY_PROMPT),
    ({"instruction": "\ufeff", "input": "\u2060", "output": "A"}, Reason.EMPTY_PROMPT),
    ({"instruction": 42, "output": "A"}, Reason.WRONG_TYPE),
    ({"instruction": "Q", "output": ["A"]}, Reason.WRONG_TYPE),
    ({"instruction": "Q", "output": "A", "input": 1}, Reason.WRONG_TYPE),
    ({"instruction": "Q", "output": True}, Reason.WRONG_TYPE),
    ({"instruction": "Q \ud800", "output": "A"}, Reason.LONE_SURROGATE),
    (
        {"messages": [turn("user", "Q"), turn("assistant", "A")], "history": [["a", "b"]]},
        Reason.UNSUPPORTED_FIELD,
    ),
    ({"instruction": "Q", "output": "A", "history": ["a", "b"]}, Reason.WRONG_TYPE),
    ({"instruction": "Q", "output": "A", "history": "a"}, Reason.WRONG_TYPE),
    ({"instruction": "Q", "output": "A", "images": ["a"]}, Reason.UNSUPPORTED_FIELD),
    ({"prompt": "Q", "completion": "A"}, Reason.OTHER_FORMAT),
    ({"messages": "user: hi"}, Reason.WRONG_TYPE),
    ({"messages": {"role": "user"}}, Reason.WRONG_TYPE),
    ({"messages": None}, Reason.NULL_FIELD),
    ({"messages": ["hi"]}, Reason.WRONG_TYPE),
    ({"messages": [turn("user", 5), ANSWER]}, Reason.WRONG_TYPE),
    ({"messages": [turn("user", None), ANSWER]}, Reason.NULL_FIELD),
    ({"messages": [turn("user", [{"type": "image", "image": "x"}]), ANSWER]}, Reason.UNSUPPORTED_FIELD),
    ({"messages": [turn("user", [5]), ANSWER]}, Reason.WRONG_TYPE),
    ({"messages": [{"content": "Q"}, ANSWER]}, Reason.MISSING_FIELD),
    ({"messages": [turn("robot", "Q"), ANSWER]}, Reason.UNKNOWN_ROLE),
    ({"messages": [turn("user", "Q"), turn("assistant", "A", tool_calls=[{}])]}, Reason.MISSING_FIELD),
    ({"messages": [turn("user", "Q", tool_calls=[CALL]), ANSWER]}, Reason.UNSUPPORTED_FIELD),
    ({"messages": [turn("user", "Q"), turn("assistant", None, tool_calls=[])]}, Reason.NULL_FIELD),
    ({"messages": [turn("user", "Q")]}, Reason.NO_ASSISTANT_TURN),
    ({"messages": []}, Reason.NO_ASSISTANT_TURN),
    ({"messages": [turn("user", "Q"), turn("assistant", "")]}, Reason.EMPTY_RESPONSE),
    ({"messages": [turn("user", "Q"), turn("assistant", "\u200b\n"), *CHAT]}, Reason.EMPTY_RESPONSE),
    ({"messages": [turn("user", " "), ANSWER]}, Reason.EMPTY_PROMPT),
    ({"messages": [turn("user", "\u200d"), ANSWER]}, Reason.EMPTY_PROMPT),
    ({"input_ids": [1, 2], "labels": [1]}, Reason.LENGTH_MISMATCH),
    ({"input_ids": [1, 2], "labels": [-100, 1]}, Reason.INVALID_LABEL),
    ({"input_ids": [1, 2], "supervised_mask": [0, 2]}, Reason.INVALID_LABEL),
    ({**PADDED, "attention_mask": [0, 1, 1]}, Reason.INVALID_ATTENTION_MASK),
    ({**PADDED, "attention_mask": [1, 1, False]}, Reason.INVALID_ATTENTION_MASK),
    ({**PADDED, "attention_mask": [1, 1, 2]}, Reason.INVALID_ATTENTION_MASK),
    ({**PADDED, "attention_mask": [1, 1]}, Reason.LENGTH_MISMATCH),
    ({**PADDED, "attention_mask": 1}, Reason.WRONG_TYPE),
    ({**PADDED, "attention_mask": [1, 1, 1.0]}, Reason.WRONG_TYPE),
    ({"input_ids": [1, 2]}, Reason.MISSING_FIELD),
    ({"input_ids": [1, 2.0], "labels": [1, 2]}, Reason.WRONG_TYPE),
    ({"input_ids": [True, 2], "labels": [1, 2]}, Reason.WRONG_TYPE),
    ({"input_ids": [], "labels": []}, Reason.EMPTY_RESPONSE),
    ({"input_ids": [1, 2**70], "labels": [1, 2]}, Reason.INVALID_TOKEN),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=lambda value: getattr(value, "value", None))
def test_every_bad_row_has_its_reason_in_an_alpaca_file(row: dict[str, Any], reason: Reason) -> None:
    """Also rows of another format: what is wrong with the row itself comes first."""
    with pytest.raises(BadRow) as caught:
        parse(row, "alpaca")
    assert caught.value.reason == reason, caught.value.message


def test_unknown_columns_are_listed_with_the_known_formats() -> None:
    with pytest.raises(BadRow, match=r"text, label.*instruction \+ output.*columns:") as caught:
        parse({"text": "a", "label": 0})
    assert caught.value.reason == Reason.UNKNOWN_COLUMNS


def test_a_named_format_is_not_guessed() -> None:
    with pytest.raises(BadRow, match="prompt is missing"):
        parse({"instruction": "Q", "output": "A"}, format="prompt_completion")


def test_the_domain_comes_from_the_source_or_the_column() -> None:
    assert RowSchema(domain="law").domain_of({}) == "law"
    by_column = RowSchema(domain_column="d", domains=("law", "code"))
    assert by_column.domain_of({"d": "code"}) == "code"
    for value, expected in (("cod", "did you mean 'code'"), (None, "is null"), (3, "is a number")):
        with pytest.raises(BadRow, match=expected) as caught:
            by_column.domain_of({"d": value})
        assert caught.value.reason == Reason.UNKNOWN_DOMAIN


def test_only_needed_columns_of_a_table_are_read() -> None:
    schema = RowSchema(domain_column="d", domains=("law",))
    assert schema.needed_columns(["prompt", "embedding", "completion", "d"]) == ["prompt", "completion", "d"]
    tokens = ["input_ids", "labels", "attention_mask"]
    assert schema.needed_columns([*tokens, "text"]) == tokens
    assert schema.needed_columns(["text", "label"]) is None
