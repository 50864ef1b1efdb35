"""A conversation as text, with the character spans that the assistant wrote.

Where the spans come from:

- The template marks them with {% generation %} (our built-in ones do): the marked text.
- It does not (the official ones of Qwen and Llama-3): a turn begins where the same template, given the
  messages before it and asked for a generation prompt, ends; that rendering must be a prefix of the whole.

In both cases a turn ends with its stop token, which is always supervised; what the template puts after it
(the newline after <|im_end|>) is not. The stop token is found by rendering: the first special token after the
text of a last assistant turn.

Templates that drop or rewrite earlier turns (Qwen3 removes their <think> blocks) work as long as what comes
before a turn stays a prefix; turns whose text was changed are counted.

What is not covered: tools, and tokens (`chat_encoder.py`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from versatune_ds.data.encode.tokenizer import (
    BUILT_IN_TEMPLATES,
    added_texts,
    special_texts,
    template_text,
)
from versatune_ds.data.rows.reasons import BadRow, Reason, short
from versatune_ds.data.rows.schemas import Conversation
from versatune_ds.foundations.errors import ConfigError

_GENERATION_TAG = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
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


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text; `spans` are (start, end) characters of what is trained on."""

    text: str
    spans: list[tuple[int, int]]
    has_special_text: bool
    """A prompt holds the text of a special token."""
    was_rewritten: bool
    """The template changed the text of a turn."""


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
        self.stop_text = self._find_stop_text()

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> ChatRenderer:
        """The template of a loaded tokenizer that `data.chat_template: name` chooses."""
        text, variables = template_text(tokenizer, name), dict(tokenizer.special_tokens_map)
        return cls(text, variables, special_texts(tokenizer), added_texts(tokenizer))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def render(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
        """The conversation as text, with marks where the template has {% generation %}.

        Raises:
            BadRow: the template refuses these messages.
        """
        compiled = self._compiled
        try:
            text: str = compiled.render(
                messages=[{"role": role, "content": content} for role, content in turns],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise BadRow(
                Reason.REFUSED_BY_TEMPLATE, f"the chat template refuses the messages: {error}"
            ) from None
        return text

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

    @functools.cached_property
    def _marks_turns(self) -> bool:
        return _GENERATION_TAG.search(self.text) is not None

    @functools.cached_property
    def _special_prefixes(self) -> tuple[str, ...]:
        return tuple(sorted({text[:2] for text in self.special_texts}))

    def render_spans(self, conversation: Conversation) -> RenderedChat:
        """The conversation with what its assistant turns span.

        Raises:
            BadRow: it cannot be rendered, or its supervised part cannot be told.
        """
        turns = conversation.turns
        special_text = False
        for i, (role, content) in enumerate(turns):
            if not any(prefix in content for prefix in self._special_prefixes):
                continue
            if role == "assistant" and self.stop_text in content:
                raise BadRow(
                    Reason.STOP_TOKEN_IN_TEXT,
                    f"the response (turn {i + 1}) holds the text of the stop token {self.stop_text}; "
                    "the model would stop there. Remove it",
                )
            special_text = special_text or any(text in content for text in self.special_texts)
        text = self.render(turns)
        if self._marks_turns:
            text, starts = self._take_marks(text)
        else:
            starts = self._starts_by_prefix(turns, text)
        responses = [content for role, content in turns if role == "assistant"]
        if len(starts) != len(responses):
            raise BadRow(
                Reason.REFUSED_BY_TEMPLATE,
                f"the template marks {len(starts)} assistant turns, the conversation has {len(responses)}; "
                "every one is trained on. Use another data.chat_template",
            )
        spans = self._close(starts, responses, text)
        changed = any(content.strip() not in text for _, content in turns)
        return RenderedChat(text, spans, special_text, changed)

    def _take_marks(self, marked: str) -> tuple[str, list[int]]:
        """Text without marks, and where each marked turn begins; parts of one turn count as one."""
        text = ""
        starts: list[int] = []
        for part in _MARK.split(marked):
            if not _MARK.fullmatch(part):
                text += part
            elif part == _Marks.START and (not starts or self.stop_text in text[starts[-1] :]):
                starts.append(len(text))
        return text, starts

    def _starts_by_prefix(self, turns: Sequence[tuple[str, str]], text: str) -> list[int]:
        starts = []
        for i, (role, _) in enumerate(turns):
            if role != "assistant":
                continue
            prompt = self.render(turns[:i], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise BadRow(
                    Reason.REFUSED_BY_TEMPLATE,
                    f"the chat template renders what comes before turn {i + 1} in another way once the turn "
                    "is there, so the supervised part cannot be told. Set data.chat_template to a built-in "
                    "template, or use a template with {% generation %} blocks",
                )
            starts.append(len(prompt))
        return starts

    def _close(self, starts: Sequence[int], responses: Sequence[str], text: str) -> list[tuple[int, int]]:
        """A turn goes from its start to the end of the first stop token; responses hold none of their own.

        Between the two stands the response, perhaps with something in front or shortened from the front. If
        it does not, the stop token belongs to a later turn.
        """
        spans = []
        for start, response in zip(starts, responses, strict=True):
            found = text.find(self.stop_text, start)
            written, given = text[start : max(found, start)].strip(), response.strip()
            if found < 0 or not (written.endswith(given[-16:]) or given.endswith(written[-16:])):
                raise BadRow(
                    Reason.NO_STOP_TOKEN,
                    f"the chat template puts no stop token {self.stop_text} right after a response (found "
                    f"{short(text[start : start + 50])}). Use a built-in data.chat_template",
                )
            spans.append((start, found + len(self.stop_text)))
        return spans

    def _find_stop_text(self) -> str:
        turns = [("user", "versatune probe question"), ("assistant", _PROBE)]
        try:
            text = _MARK.sub("", self.render(turns))
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
