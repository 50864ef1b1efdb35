"""A conversation as text, with the character spans that the assistant wrote.

Where the spans come from:

- The template marks them with {% generation %} (our built-in ones do): the marked text.
- It does not (the official ones of Qwen and Llama-3): a turn begins where the same template, given the
  messages before it and asked for a generation prompt, ends; that rendering must be a prefix of the whole.

In both cases a turn ends with its stop token, which is always supervised; what the template puts after it
(the newline after <|im_end|>) is not. The stop token is found by rendering: the first special token after the
text of a last assistant turn.

A turn that is trained on must be there whole: a template that leaves out part of its text, thoughts or calls,
or a row's tools, makes a bad row that says what is lost. Of turns that are context only (Qwen3 removes their
<think> blocks), and of prompts, changes are counted.

Templates differ in what they call thoughts, whether arguments are objects or JSON text, and whether a turn
without text has the content none or ''; each is given what its text asks for.

What is not covered: tokens (`chat_encoder.py`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from versatune_ds.data.chat.conversation import TAGS, THOUGHTS, Conversation, Turn
from versatune_ds.data.chat.turns import REASONING
from versatune_ds.data.encode.tokenizer import (
    BUILT_IN_TEMPLATES,
    added_texts,
    special_texts,
    template_text,
)
from versatune_ds.data.rows.reasons import BadRow, Reason, short
from versatune_ds.foundations.errors import ConfigError

_GENERATION_TAG = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
_PROMPTED_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
"""The beginning of a thought, or an empty one, that a prompt may end with and that turns need not have."""
_PROBE = "versatune probe answer"


class _Marks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: puts marks around what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012
    # U+FDD0 and U+FDD1 are noncharacters, never used in text.
    START, END = "\ufdd0versatune(\ufdd1", "\ufdd0versatune)\ufdd1"

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{self.START}{caller()}{self.END}"


_MARK = re.compile(f"({re.escape(_Marks.START)}|{re.escape(_Marks.END)})")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class TrainedSpan(NamedTuple):
    """Characters of an assistant turn that is trained on, its stop token included."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and what of it is trained on."""

    text: str
    spans: list[TrainedSpan]
    context: list[tuple[int, int]]
    """(start, end) of characters within spans that are not trained on after all."""
    has_special_text: bool
    """A prompt holds the text of a special token."""
    was_rewritten: bool
    """The template changed the text of a turn that is context only."""


@dataclass
class ChatRenderer:
    """Renders conversations with one template and what it sees beside the messages; picklable.

    Raises:
        ConfigError: it is broken, leaves out responses, or puts no stop token after them.
    """

    text: str
    variables: dict[str, Any]
    """The tokenizer's special tokens by their role."""
    special_texts: list[str]
    """Texts of all special tokens, the longest first; the stop token is one, also if it is not flagged so."""
    added_texts: list[str] = field(default_factory=list)
    """Texts of all added tokens."""
    stop_text: str = field(init=False)
    """Text of the token that ends an assistant turn."""

    def __post_init__(self) -> None:
        fields_of_thoughts = (name for name in REASONING if re.search(rf"""[.'"]{name}\b""", self.text))
        self._reasoning_name = next(fields_of_thoughts, REASONING[0])
        self._asks_for_none = re.search(r"\bnone\b", self.text, re.IGNORECASE) is not None
        self._marks_turns = _GENERATION_TAG.search(self.text) is not None
        self.stop_text = self._find_stop_text()
        self._special_prefixes = sorted({text[:2] for text in self.special_texts})

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> ChatRenderer:
        """The template of a loaded tokenizer that `data.chat_template: name` chooses."""
        text, variables = template_text(tokenizer, name), dict(tokenizer.special_tokens_map)
        return cls(text, variables, special_texts(tokenizer), added_texts(tokenizer))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def render(self, chat: Conversation, end: int | None = None, add_generation_prompt: bool = False) -> str:
        """The conversation, or its first turns, as text, with marks where the template has {% generation %}.

        Raises:
            BadRow: the template refuses these messages.
        """
        compiled, turns = self._compiled, chat.turns[:end]
        # Arguments of calls as objects, and no text beside them; as JSON text and '', if that is refused.
        forms = product((False, True), repeat=2) if any(turn.calls for turn in turns) else [(False, False)]
        refusals = []
        for as_text, with_text in forms:
            try:
                text: str = compiled.render(
                    messages=[self.message(turn, as_text, with_text) for turn in turns],
                    tools=list(chat.tools) or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **(self.variables | dict(chat.variables)),
                )
                return text
            except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
                refusals.append(f"the chat template refuses the messages: {error}")
        raise BadRow(Reason.REFUSED_BY_TEMPLATE, refusals[0])

    def message(self, turn: Turn, arguments_as_text: bool = False, with_text: bool = False) -> dict[str, Any]:
        """What the template sees of a turn."""
        role = turn.role
        if role == "developer" and "developer" not in self.text:
            role = "system"
        is_none = turn.calls and not turn.content and self._asks_for_none and not with_text
        content = None if is_none else turn.content
        message: dict[str, Any] = {"role": role, "content": content, **turn.about}
        if turn.reasoning:
            message[self._reasoning_name] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = [dict(call) for call in turn.calls]
        for call in message.get("tool_calls", ()) if arguments_as_text else ():
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call["function"] = call["function"] | {"arguments": arguments}
        return message

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        """Sandboxed, with what transformers offers to chat templates."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        return environment.from_string(self.text)

    def render_spans(self, chat: Conversation) -> RenderedChat:
        """The conversation with what its assistant turns span.

        Raises:
            BadRow: it cannot be rendered, its supervised part cannot be told, or part of it is lost.
        """
        turns = chat.turns
        special_text = False
        for i, turn in enumerate(turns):
            written = turn.content
            if turn.reasoning or turn.calls:
                written = "\n".join((written, turn.reasoning, *map(_written, turn.calls)))
            if not any(prefix in written for prefix in self._special_prefixes):
                continue
            if turn.is_trained and self.stop_text in written:
                raise BadRow(
                    Reason.STOP_TOKEN_IN_TEXT,
                    f"the response (turn {i + 1}) holds the text of the stop token {self.stop_text}; "
                    "the model would stop there. Remove it",
                )
            special_text = special_text or any(text in written for text in self.special_texts)
        text = self.render(chat)
        text, starts = self._take_marks(text, turns) if self._marks_turns else (text, {})
        spans: list[TrainedSpan] = []
        context: list[tuple[int, int]] = []
        changed = False
        for i, turn in enumerate(turns):
            if not turn.is_trained:
                changed = changed or turn.content.strip() not in text
                continue
            start = starts[i] if starts else self._start_by_prefix(chat, i, text)
            span = self._close(chat, i, start, text)
            spans.append(span)
            context += self._context(chat, turn, span, text)
        for tool in chat.tools:
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in text:
                raise BadRow(
                    Reason.LOST_TEXT,
                    f"the chat template leaves out the row's tools ({short(name)}); use one that has a place "
                    "for tools, such as data.chat_template: hermes, or take them out",
                )
        return RenderedChat(text, spans, context, special_text, changed)

    def _take_marks(self, marked: str, turns: Sequence[Turn]) -> tuple[str, dict[int, int]]:
        """Text without marks, and where each assistant turn begins; parts of one turn count as one."""
        text = ""
        starts: list[int] = []
        for part in _MARK.split(marked):
            if not _MARK.fullmatch(part):
                text += part
            elif part == _Marks.START and (not starts or self.stop_text in text[starts[-1] :]):
                starts.append(len(text))
        said = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if len(starts) != len(said):
            raise BadRow(
                Reason.REFUSED_BY_TEMPLATE,
                f"the template marks {len(starts)} assistant turns, the conversation has {len(said)}. Use "
                "another data.chat_template",
            )
        return text, dict(zip(said, starts, strict=True))

    def _start_by_prefix(self, chat: Conversation, i: int, text: str) -> int:
        prompt = self.render(chat, i, add_generation_prompt=True)
        for start in (prompt, _PROMPTED_THOUGHT.sub("", prompt)):
            if text.startswith(start):
                return len(start)
        raise BadRow(
            Reason.REFUSED_BY_TEMPLATE,
            f"the chat template renders what comes before turn {i + 1} in another way once the turn "
            "is there, so the supervised part cannot be told. Train on the last turn only (data.train_on: "
            "last_turn), set data.chat_template to a built-in template, or use a template with "
            "{% generation %} blocks",
        )

    def _close(self, chat: Conversation, i: int, start: int, text: str) -> TrainedSpan:
        """A turn goes from its start to the end of the first stop token; its text holds none of its own.

        Between the two stands all that it says, perhaps with something between the parts. What is missing
        is lost, or the stop token belongs to a later turn.
        """
        turn = chat.turns[i]
        found = text.find(self.stop_text, start)
        written, at = text[start : max(found, start)], 0
        lost = None
        for part in _parts(turn):
            place = min((p for form in part if (p := written.find(form, at)) >= 0), default=-1)
            if place < 0:
                lost = part[0]
                break
            at = place if turn.calls else place + len(part[0])
        if lost is not None:
            raise BadRow(
                Reason.LOST_TEXT,
                f"the chat template leaves out part of the response (turn {i + 1}): {short(lost)}. Use a "
                "template that renders it (data.chat_template: hermes has places for thoughts and calls), or "
                "if it is thoughts, set data.reasoning: drop, or data.train_on: last_turn where the last "
                "turn keeps them",
            )
        is_stopped = found >= 0
        if (
            turn.calls
        ):  # what it says last is no text: a stop token follows it, and not only the turn after it
            following = chat.turns[i + 1].content.strip() if i + 1 < len(chat.turns) else ""
            said = "".join(map(_written, turn.calls))
            is_stopped = self.stop_text in _MARK.sub("", self.render(chat, i + 1))[start:] and (
                not following or following not in written or following in said
            )
        elif not written.strip().endswith(turn.content.strip()[-16:]):
            is_stopped = False
        if not is_stopped:
            raise BadRow(
                Reason.NO_STOP_TOKEN,
                f"the chat template puts no stop token {self.stop_text} right after a response (found "
                f"{short(text[start : start + 50])}). Use a built-in data.chat_template",
            )
        return TrainedSpan(start, found + len(self.stop_text), 1.0 if turn.weight is None else turn.weight)

    def _context(
        self, chat: Conversation, turn: Turn, span: TrainedSpan, text: str
    ) -> Iterator[tuple[int, int]]:
        """Parts of a turn that are not trained on: thoughts, if they are masked; the end of an open turn."""
        written = text[span.start : span.end - len(self.stop_text)]
        if turn.is_open:
            yield span.start + len(written.rstrip()), span.end
        if not chat.masks_thoughts:
            return
        for match in THOUGHTS.finditer(written):
            if TAGS.sub("", match[0]).strip():
                yield span.start + match.start(), span.start + match.end()
        if turn.reasoning and (at := written.find(turn.reasoning.strip())) >= 0:
            end = at + len(turn.reasoning.strip())
            yield span.start + at, span.start + end

    def _find_stop_text(self) -> str:
        chat = Conversation((Turn("user", "versatune probe question"), Turn("assistant", _PROBE)))
        try:
            text = _MARK.sub("", self.render(chat))
        except BadRow as error:
            raise ConfigError(f"the chat template does not render a simple conversation: {error}") from None
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}") from None
        _, found, tail = text.rpartition(_PROBE)
        if not found:
            raise ConfigError("the chat template leaves out responses; use another data.chat_template")
        for texts in filter(None, (self.special_texts, self.added_texts)):
            if match := re.match(rf"\s*({'|'.join(map(re.escape, texts))})", tail):
                break
        else:
            raise ConfigError(
                f"the chat template puts no stop token after the assistant's text (found {short(tail)}), so "
                "a model trained with it would never stop. Use a built-in data.chat_template "
                f"({', '.join(BUILT_IN_TEMPLATES)}), or let the template write eos_token there"
            )
        if match[1] not in self.special_texts:
            self.special_texts = sorted([*self.special_texts, match[1]], key=len, reverse=True)
        return match[1]


def _written(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"], ensure_ascii=False)


def _parts(turn: Turn) -> Iterator[tuple[str, ...]]:
    """What of a turn must stand in its text, in this order, each in one of these forms.

    Thoughts within the text and the text around them may be set apart in another way; text in arguments of
    calls may be escaped as in JSON. Calls have no order among their names and arguments.
    """
    for text in (turn.reasoning, *TAGS.split(turn.content)):
        if text.strip():
            yield (text.strip(),)
    for call in turn.calls:
        yield (call["function"]["name"],)
        for leaf in _leaves(call["function"]["arguments"]):
            if (text := str(leaf).strip()) and not isinstance(leaf, bool | float | None):
                yield text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value
