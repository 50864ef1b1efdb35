"""Row schemas: a raw dict becomes a conversation, a text, or token ids with a mask, or a reason why not.

A file has one format: the named one, or the first of `FORMATS` whose required columns a row of the file has
(the first such row decides). `columns` maps these names to the file's own ones, also inside the turns of
messages and sharegpt (`role`, `content`, `from`, `value`). Other columns are not looked at. Types are strict:
nothing is turned into text, but for results of tools.

What is not covered: what stands in a turn (`data/chat`), images, and preference pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from versatune_ds.data.chat.conversation import Conversation, Turn
from versatune_ds.data.chat.flags import OF_ROWS, with_row_flags
from versatune_ds.data.chat.turns import ReadTurns, merged, read_tools, read_turns, read_variables
from versatune_ds.data.rows.reasons import (
    BadRow,
    Reason,
    column_names,
    from_json_text,
    kind_of,
    refuse_surrogates,
    short,
    transposed,
    word,
    wrong_type,
)
from versatune_ds.foundations.constants import IGNORE_INDEX
from versatune_ds.foundations.errors import unknown_name
from versatune_ds.foundations.text import is_blank

MASKS = ("supervised_mask", "loss_mask", "assistant_masks", "assistant_mask", "completion_mask")
"""Columns with a number for each token: 0 (context) to 1 (trained on)."""
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
VARIABLES = ("chat_template_kwargs", "template_kwargs", "enable_thinking")
BESIDE_TURNS = (*SYSTEM, *TOOLS, *VARIABLES)
BEFORE_RESPONSE = ("history", "reasoning_content")
# Required and optional columns, in the order of detection: the more specific first. All may have `OF_ROWS`.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), BESIDE_TURNS),
    "sharegpt": (("conversations",), BESIDE_TURNS),
    "pretokenized": (("input_ids",), ("labels", *MASKS, "attention_mask")),
    "alpaca": (("instruction", "output"), ("input", *BEFORE_RESPONSE, *BESIDE_TURNS)),
    "prompt_completion": (("prompt", "completion"), (*BEFORE_RESPONSE, *BESIDE_TURNS)),
    "text": (("text",), ("finished",)),
}
NAMED_ONLY = ("text",)
"""Formats that no column tells: a column `text` may also hold rendered chats, whose prompts nobody wants to
train on."""
# What carries meaning that we would lose in silence, but where a format reads it; null and empty are fine.
UNSUPPORTED_IN_ROWS = ("history", "images", "videos", "audios")


@dataclass(frozen=True)
class TokenRow:
    """A row that came with token ids."""

    tokens: npt.NDArray[np.int64]
    """int64[n]."""
    mask: npt.NDArray[np.bool_]
    """bool[n], True: trained on."""
    weights: npt.NDArray[np.float32] | None = None
    """float32[n], factors in the loss; None: 1 where trained on."""


class TextRow(NamedTuple):
    """A whole text, all of it trained on; also what `versatune-ds detect` writes (sequences.jsonl)."""

    text: str
    is_finished: bool = True
    """False: it was cut, so no end token is trained on behind it."""
    weight: float = 1.0
    """Factor in the loss."""


Content = Conversation | TokenRow | TextRow


@dataclass(frozen=True)
class RowSchema:
    """How the rows of one source are read; small and picklable."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    domain: str | None = None
    domain_column: str | None = None
    domains: tuple[str, ...] = ()
    """Known domains, for `domain_column`."""

    def column(self, name: str) -> str:
        """The file's name of our column `name`."""
        return self.columns.get(name, name)

    def detect(self, names: Iterable[str]) -> str | None:
        """The format that rows with these columns have, or None; a named format is taken as it is."""
        if self.format != "auto":
            return self.format
        present = set(names)
        for format, (required, _) in FORMATS.items():
            if format not in NAMED_ONLY and all(self.column(name) in present for name in required):
                return format
        return None

    def ours(self, column: str) -> str:
        """Our name of the file's column; of one that stands for none "", if another column has its name."""
        mapped = (ours for ours, theirs in self.columns.items() if theirs == column)
        return next(mapped, "" if column in self.columns else column)

    def is_read(self, column: str, format: str) -> bool:
        """Whether a row of this format is asked for this column; others are not used."""
        ours = self.ours(column)
        named = ours in (*chain(*FORMATS[format]), *UNSUPPORTED_IN_ROWS) or word(ours) in OF_ROWS
        return named or column == self.domain_column

    def needed_columns(self, names: list[str]) -> list[str] | None:
        """Of a table's columns those that are read; None (all) when no format fits, for the error text."""
        format = self.detect(names)
        if format is None:
            return None
        needed = [name for name in names if self.is_read(name, format)]
        return needed if all(self.column(name) in needed for name in FORMATS[format][0]) else None

    def domain_of(self, row: Mapping[str, Any]) -> str:
        """The row's domain; BadRow: its column is absent, not text, or names an unknown domain."""
        if self.domain is not None:
            return self.domain
        assert self.domain_column is not None  # the settings give one of the two
        value = row.get(self.domain_column)
        if not isinstance(value, str):
            found = f"is {kind_of(value)}" if self.domain_column in row else "is missing"
            if type(value) is int:
                found += ", and the file's metadata hold no name for it (class labels); write names"
            raise BadRow(
                Reason.UNKNOWN_DOMAIN,
                f"the domain column {self.domain_column!r} {found}; allowed: {', '.join(self.domains)}",
            )
        if value not in self.domains:
            raise BadRow(Reason.UNKNOWN_DOMAIN, unknown_name("domain", short(value)[1:-1], self.domains))
        return value

    def parse(self, row: Mapping[str, Any], format: str | None, *, drop_nulls: bool = False) -> Content:
        """Check a row against the format of its file.

        Args:
            drop_nulls: fields of calls and tools that are null stand for none, as in rows of tables.

        Raises:
            BadRow: the row cannot be used.
        """
        if format is None:
            told = {name: required for name, (required, _) in FORMATS.items() if name not in NAMED_ONLY}
            known = "; ".join(f"{name}: {' + '.join(required)}" for name, required in told.items())
            raise BadRow(
                Reason.UNKNOWN_COLUMNS,
                f"found the columns {column_names(row)}, which fit no format ({known}). Map them in the "
                "source, e.g. `columns: {prompt: question, completion: answer}`; whole texts, all of which "
                "is trained on, need `format: text`",
            )
        if self.format == "auto" and not any(self.column(name) in row for name in FORMATS[format][0]):
            return self._parse_other(row, format)
        return self._parse_as(row, format, drop_nulls)

    def _parse_other(self, row: Mapping[str, Any], format: str) -> Content:
        """A row with none of the format's columns: is it another format's (and then, is it at all sound)?"""
        other = self.detect(row)
        if other is None:
            return self._parse_as(row, format)  # names the missing columns
        self._parse_as(row, other)
        raise BadRow(
            Reason.OTHER_FORMAT,
            f"found a row of format {other}; the file's first rows are {format}. Use one format per file",
        )

    def _parse_as(self, row: Mapping[str, Any], format: str, drop_nulls: bool = False) -> Content:
        for name in UNSUPPORTED_IN_ROWS:
            if row.get(name) and name not in FORMATS[format][1]:
                raise BadRow(
                    Reason.UNSUPPORTED_FIELD, f"the field {name!r} is set; it is not supported. Remove it"
                )
        if format == "pretokenized":
            return self._token_row(row)
        if format == "text":
            return self._text_row(row)
        read: ReadTurns = getattr(self, f"_{format}")(row, drop_nulls)
        before = self._history(row) if "history" in FORMATS[format][1] else []
        notes = read.notes
        if any(turn.weight and turn.role != "assistant" for turn in read.turns):
            notes |= {"flags_elsewhere"}
        masks = [*(None for _ in before), *read.masks]
        weight, turns = with_row_flags(row, before + read.turns, masks, self.ours)
        turns = [*self._system(row, turns), *merged(turns)]
        _check_turns(turns)
        given = ((name, row.get(self.column(name))) for name in TOOLS)
        tools = [tool for name, value in given for tool in read_tools(value, self.column(name), drop_nulls)]
        tools += [tool for tool in read.tools if tool not in tools]
        variables: dict[str, Any] = {}
        for name in VARIABLES:
            value = row.get(self.column(name))
            if name == "enable_thinking":
                value = None if value is None else {name: value}
            variables |= read_variables(value, self.column(name), drop_nulls)
        return Conversation(tuple(turns), tuple(tools), variables, weight, notes, unused=read.unused)

    # One method per format; types checked.

    def _messages(self, row: Mapping[str, Any], drop_nulls: bool) -> ReadTurns:
        return self._turns(row, "messages", ("role", "from"), ("content", "value"), drop_nulls)

    def _sharegpt(self, row: Mapping[str, Any], drop_nulls: bool) -> ReadTurns:
        return self._turns(row, "conversations", ("from", "role"), ("value", "content"), drop_nulls)

    def _alpaca(self, row: Mapping[str, Any], drop_nulls: bool) -> ReadTurns:
        prompt = self._text(row, "instruction")
        extra = self._text(row, "input", optional=True)
        if not is_blank(extra):
            prompt = extra if is_blank(prompt) else f"{prompt}\n\n{extra}"
        return ReadTurns([Turn("user", prompt), self._response(row, "output")], [None, None])

    def _prompt_completion(self, row: Mapping[str, Any], drop_nulls: bool) -> ReadTurns:
        """Texts, or as TRL has it lists of messages; of these the completion is trained on."""
        parts = []
        for name in ("prompt", "completion"):
            if _holds_turns(row.get(self.column(name))):
                parts.append(self._turns(row, name, ("role", "from"), ("content", "value"), drop_nulls))
            else:
                turn = Turn("user", self._text(row, name)) if name == "prompt" else self._response(row, name)
                parts.append(ReadTurns([turn], [None]))
        prompt, completion = parts
        context = [t._replace(weight=0.0) if t.role == "assistant" else t for t in prompt.turns]
        return ReadTurns(
            context + completion.turns,
            prompt.masks + completion.masks,
            prompt.tools + completion.tools,
            prompt.unused | completion.unused,
            prompt.notes | completion.notes,
        )

    def _response(self, row: Mapping[str, Any], name: str) -> Turn:
        return Turn("assistant", self._text(row, name), self._text(row, "reasoning_content", optional=True))

    def _history(self, row: Mapping[str, Any]) -> list[Turn]:
        """Rounds that came before, `[[prompt, response], ...]`, which are trained on as any turn."""
        column = self.column("history")
        rounds = from_json_text(row.get(column), "[") or []
        if not isinstance(rounds, list):
            raise wrong_type(column, rounds, "a list of rounds [prompt, response]")
        turns = []
        for i, texts in enumerate(rounds):
            if not (isinstance(texts, list) and [type(text) for text in texts] == [str, str]):
                raise wrong_type(f"{column}[{i}]", texts, "two texts, [prompt, response]")
            for role, text in zip(("user", "assistant"), texts, strict=True):
                refuse_surrogates(f"{column}[{i}]", text)
                turns.append(Turn(role, text))
        return turns

    def _system(self, row: Mapping[str, Any], turns: Sequence[Turn]) -> list[Turn]:
        """The system text that stands in a column, unless the first turn says the same."""
        texts = {self._text(row, name, optional=True) for name in SYSTEM} - {""}
        texts = {text for text in texts if not is_blank(text)}
        if len(texts) > 1:
            raise BadRow(Reason.UNSUPPORTED_FIELD, f"{' and '.join(SYSTEM)} differ; give one system text")
        return [Turn("system", text) for text in texts if [text] != [turn.content for turn in turns[:1]]]

    def _turns(
        self,
        row: Mapping[str, Any],
        name: str,
        role_names: Sequence[str],
        content_names: Sequence[str],
        drop_nulls: bool,
    ) -> ReadTurns:
        value = self._value(row, name)
        turns = transposed(from_json_text(value, "["))
        names = [(self.column(names[0]), *names) for names in (role_names, content_names)]
        drop_nulls = drop_nulls and not isinstance(value, str)  # JSON text holds what was written
        read = read_turns(turns, self.column(name), names[0], names[1], drop_nulls)
        return read._replace(notes=frozenset({"json_text"})) if isinstance(value, str) else read

    def _value(self, row: Mapping[str, Any], name: str) -> Any:
        column = self.column(name)
        if column not in row:
            found = f"{column} is missing (found: {column_names(row)})"
            raise BadRow(Reason.MISSING_FIELD, f"{found}; give it, or map `columns`")
        if row[column] is None:
            raise BadRow(Reason.NULL_FIELD, f"{column} is null; a value is needed")
        return row[column]

    def _text(self, row: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
        column = self.column(name)
        if optional and row.get(column) is None:
            return ""
        value = self._value(row, name)
        if not isinstance(value, str):
            raise wrong_type(column, value, "a string")
        refuse_surrogates(column, value)
        return value

    # Whole texts, and pre-tokenised rows.

    def _text_row(self, row: Mapping[str, Any]) -> TextRow:
        text, finished = self._text(row, "text"), row.get(self.column("finished"))
        if is_blank(text):
            raise BadRow(Reason.BLANK_TEXT, "the text is empty, or white space or invisible characters only")
        if finished not in (None, True, False):
            raise wrong_type(self.column("finished"), finished, "true or false")
        values = {name: value for name, value in row.items() if not isinstance(value, list)}
        weight, _ = with_row_flags(values, [], [], self.ours)
        if weight == 0:
            raise BadRow(Reason.SWITCHED_OFF, "the row has the weight 0")
        return TextRow(text, finished is not False, 1.0 if weight is None else weight)

    def _token_row(self, row: Mapping[str, Any]) -> TokenRow:
        tokens = self._numbers(row, "input_ids")
        if tokens.size == 0:
            raise BadRow(Reason.EMPTY_RESPONSE, f"{self.column('input_ids')} is an empty list")
        self._refuse_padding(row, len(tokens))
        given = [name for name in ("labels", *MASKS) if row.get(self.column(name)) is not None]
        of_tokens = {self.column(name) for name in MASKS}
        beside = {name: value for name, value in row.items() if name not in of_tokens}
        for name, value in beside.items():
            if word(self.ours(name)) in OF_ROWS and isinstance(value, list):
                said = f"{name} is a list; weights of tokens are read from supervised_mask (0 to 1)"
                raise BadRow(Reason.UNSUPPORTED_FIELD, said)
        factor, _ = with_row_flags(beside, [], [], self.ours)
        if len(given) != 1:
            found = "both are given" if given else "neither is given"
            raise BadRow(
                Reason.MISSING_FIELD,
                f"{found}; one of {self.column('labels')} and {self.column('supervised_mask')} is needed",
            )
        column = self.column(given[0])
        if given[0] == "labels":
            labels = self._per_token(row, "labels", len(tokens))
            values = np.where(labels != IGNORE_INDEX, 1.0, 0.0)
            allowed = f"{IGNORE_INDEX} or the token at the same position (labels are not shifted)"
            bad = np.flatnonzero((values > 0) & (labels != tokens))
        else:
            labels = values = self._per_token(row, given[0], len(tokens), (int, bool, float))
            allowed = "0 to 1 (false or true)"
            bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
        if bad.size:
            raise BadRow(Reason.INVALID_LABEL, f"{column}[{bad[0]}] is {labels[bad[0]]}; allowed: {allowed}")
        weights = (values * (1.0 if factor is None else factor)).astype(np.float32)
        if not weights.any() and values.any():
            raise BadRow(Reason.SWITCHED_OFF, "the row has the weight 0")
        return TokenRow(tokens, weights > 0, weights if (weights[weights > 0] != 1).any() else None)

    def _refuse_padding(self, row: Mapping[str, Any], num_tokens: int) -> None:
        """Samples are packed one behind the other: padding in a row would be context like any other token."""
        column = self.column("attention_mask")
        if row.get(column) is None:
            return
        values = self._per_token(row, "attention_mask", num_tokens, (int, bool))
        bad = np.flatnonzero(values != 1)
        if bad.size:
            raise BadRow(
                Reason.INVALID_ATTENTION_MASK,
                f"{column}[{bad[0]}] is {values[bad[0]]}; allowed: 1 everywhere, or no {column}. Take the "
                "padding off: every token of a row is seen by those after it",
            )

    def _per_token(
        self, row: Mapping[str, Any], name: str, num_tokens: int, allowed: tuple[type, ...] = (int,)
    ) -> npt.NDArray[Any]:
        values = self._numbers(row, name, allowed)
        if len(values) != num_tokens:
            found = f"{self.column(name)} has {len(values)} entries"
            raise BadRow(
                Reason.LENGTH_MISMATCH, f"{found}, {self.column('input_ids')} has {num_tokens}; one per token"
            )
        return values

    def _numbers(
        self, row: Mapping[str, Any], name: str, allowed: tuple[type, ...] = (int,)
    ) -> npt.NDArray[Any]:
        """int64[n]; float64[n] where floats are allowed."""
        values = from_json_text(self._value(row, name), "[")
        column = self.column(name)
        if not isinstance(values, list):
            raise wrong_type(column, values, "a list of integers")
        for i, value in enumerate(values):
            if type(value) not in allowed:
                raise wrong_type(f"{column}[{i}]", value, "a number" if float in allowed else "an integer")
        try:
            return np.array(values, dtype=np.float64 if float in allowed else np.int64)
        except OverflowError:
            raise BadRow(Reason.INVALID_TOKEN, f"{column} holds a number beyond 64 bits") from None


def _holds_turns(value: Any) -> bool:
    """Whether this is no text: a list, or JSON text of one with roles in it."""
    turns = transposed(from_json_text(value, "["))
    if not isinstance(turns, list):
        return False
    return not isinstance(value, str) or any(isinstance(t, dict) and {"role", "from"} & {*t} for t in turns)


def _check_turns(turns: Sequence[Turn]) -> None:
    """At least one assistant turn; only system turns, results and turns with calls may be empty."""
    if not any(turn.role == "assistant" for turn in turns):
        found = ", ".join(turn.role for turn in turns[:8]) or "no turn at all"
        raise BadRow(Reason.NO_ASSISTANT_TURN, f"no assistant turn, so nothing to train on (found: {found})")
    for i, turn in enumerate(turns):
        if turn.role in ("system", "developer", "tool") or turn.calls or not is_blank(turn.content):
            continue
        found = "white space or invisible characters only" if turn.content else "empty"
        if turn.role == "assistant":
            raise BadRow(Reason.EMPTY_RESPONSE, f"the response (turn {i + 1}) is {found}")
        raise BadRow(Reason.EMPTY_PROMPT, f"the prompt (turn {i + 1}) is {found}")
