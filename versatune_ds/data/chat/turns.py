"""Turns, tools and template variables as they stand in rows, in the spellings of the tools that wrote them.

OpenAI's messages, ShareGPT's conversations, and what TRL, LLaMA-Factory, ms-swift and FastChat add to them:
roles by many names, parts of text, calls as objects or as JSON text, thoughts in fields of their own.

What is not covered: columns (`rows/schemas.py`), and parts that are not text (refused).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from versatune_ds.data.chat.conversation import Turn
from versatune_ds.data.chat.flags import FLAGS, refuse_unclear, weight_of
from versatune_ds.data.rows.reasons import (
    BadRow,
    Reason,
    column_names,
    from_json_text,
    refuse_surrogates,
    short,
    transposed,
    word,
    word_set,
    wrong_type,
)
from versatune_ds.foundations.text import is_blank

CALL = "function_call"
ALIASES = {
    "system": "system",
    "developer": "developer",
    "user": "user human prompter input instruction question",
    "assistant": "assistant bard bing claude gemini bot chatbot ai model llm output response answer",
    "tool": "tool function ipython observation tool_response tool_result tool_results tool_output "
    "tool_message function_response function_result function_output environment",
    CALL: "function_call tool_call tool_calls",
}
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in word_set(aliases)}
"""By `word`."""
_GPT = re.compile(r"(?:chat)?gpt[\d.]*o?(?:mini|turbo)?")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thinking_content", "reasoning_text")
TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
THOUGHT_PARTS = ("thinking", "reasoning")
OPEN = ("prefix", "partial", "continue")
ALWAYS_READ = ("tool_calls", "function_call", "tools", "mask")
READ_OF = {"assistant": (*REASONING, *OPEN), "tool": ("name", "tool_call_id")}
"""Further fields of a turn."""
RESERVED = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
)


class ReadTurns(NamedTuple):
    """Turns of a row, and what else was found in them."""

    turns: list[Turn]
    masks: list[Any]
    """The unclear field `mask` of each."""
    tools: tuple[Any, ...] = ()
    """Given in a turn, as for ChatGLM, not in a column."""
    unused: frozenset[str] = frozenset()
    """Fields that are not read, as `messages[].name`."""
    notes: frozenset[str] = frozenset()
    """What is to be counted, see `cache/summary.py`."""


def read_turns(
    values: Any, place: str, role_names: Sequence[str], content_names: Sequence[str], drop_nulls: bool
) -> ReadTurns:
    """What stands in a list of turns.

    Args:
        place: of the list, for error texts.
        role_names, content_names: of a turn's fields; the first that is there and not null.
        drop_nulls: in calls, fields that are null stand for none (a table's rows have all fields).

    Raises:
        BadRow: what a turn holds cannot be used.
    """
    if not isinstance(values, list):
        wanted = "a list of turns, or that as JSON text (json.dumps writes it, str does not)"
        raise wrong_type(place, values, wanted)
    turns, masks, unused = [], [], set()
    tools: list[Any] = []
    for i, value in enumerate(values):
        where = f"{place}[{i}]"
        fields = from_json_text(value, "{")
        if not isinstance(fields, dict):
            raise wrong_type(where, value, f"an object with {role_names[0]} and {content_names[0]}")
        turn = _read_turn(fields, where, role_names, content_names, drop_nulls)
        turns.append(turn)
        masks.append(fields.get("mask"))
        tools += read_tools(fields.get("tools"), f"{where}.tools", drop_nulls)
        known = {*role_names, *content_names, *ALWAYS_READ, *READ_OF.get(turn.role, ())}
        for name, value in fields.items():
            if name in known or value in (None, "", [], {}) or word(name) in FLAGS:
                continue
            if turn.role == "assistant":
                refuse_unclear(name, [value], f"{where}.")
            unused.add(f"{place}[].{name}")
    return ReadTurns(turns, masks, tuple(tools), frozenset(unused))


def _read_turn(
    fields: Mapping[str, Any],
    where: str,
    role_names: Sequence[str],
    content_names: Sequence[str],
    drop_nulls: bool,
) -> Turn:
    name, speaker = _field(fields, where, role_names)
    if not isinstance(speaker, str):
        raise wrong_type(f"{where}.{name}", speaker, "a string")
    spoken = word(speaker.strip().removesuffix(":"))
    role = "assistant" if _GPT.fullmatch(spoken) else ROLES.get(spoken)
    if role is None:
        raise BadRow(
            Reason.UNKNOWN_ROLE,
            f"{where}.{name} is {short(speaker)}; allowed: system, user, assistant, tool, developer, and "
            "other names for them, such as human, gpt, function_call and observation",
        )
    calls = _read_calls(fields, where, drop_nulls)
    if calls and role not in ("assistant", CALL):
        raise BadRow(Reason.UNSUPPORTED_FIELD, f"{where} calls a tool, and is no assistant turn")
    has_content = any(fields.get(key) is not None for key in content_names)
    name, content = _field(fields, where, content_names) if has_content or not calls else ("", "")
    text, thoughts = _read_content(content, f"{where}.{name}", is_result=role == "tool")
    for key in REASONING if role == "assistant" else ():
        if isinstance(value := fields.get(key), str | list):
            thoughts.append(_read_content(value, f"{where}.{key}")[0])
    if role == CALL:
        role = "assistant"
        if written := _calls_in_text(text, f"{where}.{name}"):
            text, calls = "", written
    return Turn(
        role,
        text,
        "\n\n".join(dict.fromkeys(thought for thought in thoughts if not is_blank(thought))),
        calls,
        weight_of(fields, f"{where}."),
        role == "assistant" and any(fields.get(key) is True for key in OPEN),
        {key: fields[key] for key in ("name", "tool_call_id") if isinstance(fields.get(key), str)}
        if role == "tool"
        else {},
    )


def _field(fields: Mapping[str, Any], where: str, names: Sequence[str]) -> tuple[str, Any]:
    """(name, value) of the first of these fields that is there."""
    there = [name for name in names if name in fields]
    if not there:
        raise BadRow(
            Reason.MISSING_FIELD,
            f"{where}.{names[0]} is missing (found: {column_names(fields)}); give it, or map `columns`",
        )
    name = next((name for name in there if fields[name] is not None), there[0])
    if fields[name] is None:
        raise BadRow(Reason.NULL_FIELD, f"{where}.{name} is null; a value is needed")
    return name, fields[name]


def _read_content(value: Any, place: str, *, is_result: bool = False) -> tuple[str, list[str]]:
    """(text, thoughts): parts of text joined as they are."""
    value = value if is_result else transposed(value)
    is_text = isinstance(value, str) or (isinstance(value, list) and all(map(_is_part, value)))
    if is_result and not is_text:
        value = json.dumps(value, ensure_ascii=False)
    parts = value if isinstance(value, list) else [value]
    text: list[str] = []
    thoughts: list[str] = []
    for i, part in enumerate(parts):
        where, target = f"{place}[{i}]" if isinstance(value, list) else place, text
        if isinstance(value, list) and isinstance(part, dict):
            kind = part.get("type") or "text"
            if kind not in TEXT_PARTS + THOUGHT_PARTS:
                raise BadRow(
                    Reason.UNSUPPORTED_FIELD,
                    f"{where} is a part of type {short(kind)}; only parts of text can be trained on",
                )
            names: tuple[str, ...] = ("text", "content", "value")
            if kind in THOUGHT_PARTS:
                names, target = (*THOUGHT_PARTS, "summary", *names), thoughts
            _, part = _field(part, where, names)
            if isinstance(part, list) and target is thoughts:
                part = "".join(_read_content(part, where)[0])
        if not isinstance(part, str):
            raise wrong_type(where, part, "a string, or a list of parts of text")
        refuse_surrogates(where, part)
        target.append(part)
    return "".join(text), thoughts


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("text"), str))


# Calls and tools.


def _read_calls(fields: Mapping[str, Any], where: str, drop_nulls: bool) -> tuple[dict[str, Any], ...]:
    drop_nulls = drop_nulls and not isinstance(fields.get("tool_calls"), str)
    given = transposed(from_json_text(fields.get("tool_calls"), "[{")) or []
    if not isinstance(given, list):
        given = [given]
    place = f"{where}.tool_calls"
    if not given and (legacy := from_json_text(fields.get("function_call"), "{")):
        given, place = [legacy], f"{where}.function_call"
    return tuple(_read_call(call, f"{place}[{i}]", drop_nulls) for i, call in enumerate(given))


def _read_call(call: Any, place: str, drop_nulls: bool) -> dict[str, Any]:
    call = from_json_text(call, "{")
    if not isinstance(call, dict):
        raise wrong_type(place, call, "an object with a function")
    function = from_json_text(call.get("function"), "{")
    outer = {key: value for key, value in call.items() if value is not None and key != "function"}
    if not isinstance(function, dict):
        function, outer = outer, {key: outer[key] for key in ("id",) if key in outer}
        function = {key: function[key] for key in ("name", "arguments", "parameters") if key in function}
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRow(Reason.MISSING_FIELD, f"{place} names no function (found: {column_names(call)})")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise BadRow(Reason.INVALID_JSON, f"{place}: the arguments are no JSON ({error})") from None
    elif drop_nulls:
        arguments = without_nulls(arguments)
    arguments = {} if arguments is None else arguments
    refuse_surrogates(place, json.dumps([name, arguments], ensure_ascii=False))
    return {"type": "function", **outer, "function": {"name": name, "arguments": arguments}}


def _calls_in_text(text: str, place: str) -> tuple[dict[str, Any], ...]:
    """Calls that ShareGPT writes as JSON text; none where it is another text, which is then the response."""
    value = from_json_text(text, "[{")
    given = value if isinstance(value, list) else [value]
    if not given or not all(
        isinstance(call, dict) and ("name" in call or "function" in call) for call in given
    ):
        return ()
    return tuple(_read_call(call, f"{place}[{i}]", False) for i, call in enumerate(given))


def merged(turns: Iterable[Turn]) -> list[Turn]:
    """Calls that stand in turns of their own join the assistant turn before them, as the model writes."""
    result: list[Turn] = []
    for turn in turns:
        before = result[-1] if result else None
        is_bare = turn.calls and not turn.content and not any("id" in call for call in turn.calls)
        if is_bare and before and (before.role, before.weight) == (turn.role, turn.weight):
            result[-1] = before._replace(
                calls=before.calls + turn.calls, reasoning=before.reasoning or turn.reasoning
            )
        else:
            result.append(turn)
    return result


def read_tools(value: Any, place: str, drop_nulls: bool) -> tuple[Any, ...]:
    """The functions of a row, a list or JSON text (else BadRow); each as OpenAI's API takes it."""
    drop_nulls = drop_nulls and not isinstance(value, str)
    tools = transposed(from_json_text(value, "[{"))
    tools = [tools] if isinstance(tools, dict) and tools else tools or []
    if isinstance(tools, str) and (is_blank(tools) or tools.strip() == "null"):
        tools = []
    if not isinstance(tools, list):
        raise wrong_type(place, value, "a list of functions, or that as JSON text")
    result = []
    for i, tool in enumerate(tools):
        written, tool = tool, from_json_text(tool, "{")
        if not isinstance(tool, dict):
            raise wrong_type(f"{place}[{i}]", tool, "an object that describes a function")
        tool = without_nulls(tool) if drop_nulls and tool is written else tool
        result.append(
            tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        )
    if result:
        refuse_surrogates(place, json.dumps(result, ensure_ascii=False))
    return tuple(result)


def read_variables(value: Any, place: str, drop_nulls: bool) -> dict[str, Any]:
    """Variables of the chat template; BadRow: no object, or a name in it that is not for rows to set."""
    variables = from_json_text(value, "{") or {}
    if not isinstance(variables, dict):
        raise wrong_type(place, value, "an object with variables of the chat template")
    if taken := sorted(set(variables) & set(RESERVED)):
        raise BadRow(Reason.UNSUPPORTED_FIELD, f"{place} sets {', '.join(taken)}, which a row cannot")
    return {name: v for name, v in variables.items() if not (drop_nulls and v is None)}


def without_nulls(value: Any) -> Any:
    """`value` without fields that are null, at any depth."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value
