"""Row schemas: a raw dict becomes a conversation, or token ids with a mask, or a reason why not.

A file has one format: the named one, or the first of `FORMATS` whose required columns a row of the file has
(the first such row decides). `columns` maps these names to the file's own ones, also inside the turns of
messages and sharegpt (`role`, `content`, `from`, `value`). Other columns are not looked at. Types are strict:
nothing is turned into text.

What is not covered: tools, images, and preference pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.data.rows.reasons import BadRow, Reason, kind_of, short
from versatune_ds.foundations.constants import IGNORE_INDEX
from versatune_ds.foundations.errors import unknown_name
from versatune_ds.foundations.text import is_blank

# Required and optional columns, in the order of detection: the more specific first.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "pretokenized": (("input_ids",), ("labels", "supervised_mask", "attention_mask")),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt_completion": (("prompt", "completion"), ("system",)),
}
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
# What carries meaning that we would lose in silence; absent, null and empty are fine.
UNSUPPORTED_IN_TURNS = ("tool_calls", "function_call")
UNSUPPORTED_IN_ROWS = ("tools", "functions", "history")


@dataclass(frozen=True)
class Conversation:
    """(role, content) turns; roles are `ROLES`, at least one turn is the assistant's."""

    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TokenRow:
    """A row that came with token ids: int64[n] and bool[n] (True: trained on)."""

    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]


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
            if all(self.column(name) in present for name in required):
                return format
        return None

    def read_columns(self, format: str) -> set[str]:
        """All columns that a row of this format is asked for; others are not used."""
        required, optional = FORMATS[format]
        wanted = {self.column(name) for name in (*required, *optional)} | set(UNSUPPORTED_IN_ROWS)
        return wanted | ({self.domain_column} if self.domain_column else set())

    def needed_columns(self, names: list[str]) -> list[str] | None:
        """Of a table's columns those that are read; None (all) when no format fits, for the error text."""
        format = self.detect(names)
        if format is None:
            return None
        wanted = self.read_columns(format)
        needed = [name for name in names if name in wanted]
        return needed if all(self.column(name) in needed for name in FORMATS[format][0]) else None

    def domain_of(self, row: Mapping[str, Any]) -> str:
        """The row's domain.

        Raises:
            BadRow: the domain column is absent, not text, or names an unknown domain.
        """
        if self.domain is not None:
            return self.domain
        assert self.domain_column is not None  # the settings give one of the two
        value = row.get(self.domain_column)
        if not isinstance(value, str):
            found = f"is {kind_of(value)}" if self.domain_column in row else "is missing"
            if type(value) is int:
                found += (
                    ", and the file's metadata hold no name for it (class labels); write names"
                )
            raise BadRow(
                Reason.UNKNOWN_DOMAIN,
                f"the domain column {self.domain_column!r} {found}; allowed: {', '.join(self.domains)}",
            )
        if value not in self.domains:
            raise BadRow(Reason.UNKNOWN_DOMAIN, unknown_name("domain", short(value)[1:-1], self.domains))
        return value

    def parse(self, row: Mapping[str, Any], format: str | None) -> Conversation | TokenRow:
        """Check a row against the format of its file.

        Raises:
            BadRow: the row cannot be used.
        """
        if format is None:
            raise self._unknown_columns(row)
        if self.format == "auto" and not any(self.column(name) in row for name in FORMATS[format][0]):
            return self._parse_other(row, format)
        return self._parse_as(row, format)

    def _parse_other(self, row: Mapping[str, Any], format: str) -> Conversation | TokenRow:
        """A row with none of the format's columns: is it another format's (and then, is it at all sound)?"""
        other = self.detect(row)
        if other is None:
            return self._parse_as(row, format)  # names the missing columns
        self._parse_as(row, other)
        raise BadRow(
            Reason.OTHER_FORMAT,
            f"found a row of format {other}; the file's first rows are {format}. Use one format per file",
        )

    def _parse_as(self, row: Mapping[str, Any], format: str) -> Conversation | TokenRow:
        for name in UNSUPPORTED_IN_ROWS:
            if row.get(name):
                raise BadRow(
                    Reason.UNSUPPORTED_FIELD, f"the field {name!r} is set; it is not supported. Remove it"
                )
        if format == "pretokenized":
            return self._token_row(row)
        turns = getattr(self, f"_{format}")(row)
        _check_turns(turns)
        return Conversation(tuple(turns))

    def _unknown_columns(self, row: Mapping[str, Any]) -> BadRow:
        known = "; ".join(f"{name}: {' + '.join(required)}" for name, (required, _) in FORMATS.items())
        return BadRow(
            Reason.UNKNOWN_COLUMNS,
            f"found the columns {_names(row)}, which fit no format ({known}). Map them in the source, e.g. "
            "`columns: {prompt: question, completion: answer}`",
        )

    # One method per format: the turns, types checked.

    def _messages(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        return self._turns(row, "messages", "role", "content", {role: role for role in ROLES})

    def _sharegpt(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        turns = self._turns(row, "conversations", "from", "value", SHAREGPT_ROLES)
        return self._system(row) + turns

    def _alpaca(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        prompt = self._text(row, "instruction")
        extra = self._text(row, "input", optional=True)
        response = self._text(row, "output")
        if not is_blank(extra):
            prompt = extra if is_blank(prompt) else f"{prompt}\n\n{extra}"
        return [*self._system(row), ("user", prompt), ("assistant", response)]

    def _prompt_completion(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        prompt, response = self._text(row, "prompt"), self._text(row, "completion")
        return [*self._system(row), ("user", prompt), ("assistant", response)]

    def _system(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        text = self._text(row, "system", optional=True)
        return [] if is_blank(text) else [("system", text)]

    def _turns(
        self, row: Mapping[str, Any], name: str, role: str, content: str, roles: Mapping[str, str]
    ) -> list[tuple[str, str]]:
        turns = transposed(self._value(row, name))
        if not isinstance(turns, list):
            raise _wrong_type(self.column(name), turns, "a list of turns")
        result = []
        for i, turn in enumerate(turns):
            where = f"{self.column(name)}[{i}]"
            if not isinstance(turn, dict):
                wanted = f"an object with {self.column(role)} and {self.column(content)}"
                raise _wrong_type(where, turn, wanted)
            for unsupported in UNSUPPORTED_IN_TURNS:
                if turn.get(unsupported):
                    raise BadRow(
                        Reason.UNSUPPORTED_FIELD,
                        f"{where}.{unsupported} is set; it is not supported. Remove it",
                    )
            speaker = self._text(turn, role, where=where)
            if speaker not in roles:
                raise BadRow(
                    Reason.UNKNOWN_ROLE,
                    f"{where}.{self.column(role)} is {short(speaker)}; allowed: {', '.join(roles)}",
                )
            result.append((roles[speaker], self._text(turn, content, where=where)))
        return result

    def _value(self, row: Mapping[str, Any], name: str, where: str = "") -> Any:
        column = self.column(name)
        place = f"{where}.{column}" if where else column
        if column not in row:
            found = f"{place} is missing (found: {_names(row)})"
            raise BadRow(Reason.MISSING_FIELD, f"{found}; give it, or map `columns`")
        if row[column] is None:
            raise BadRow(Reason.NULL_FIELD, f"{place} is null; a value is needed")
        return row[column]

    def _text(self, row: Mapping[str, Any], name: str, *, optional: bool = False, where: str = "") -> str:
        column = self.column(name)
        if optional and row.get(column) is None:
            return ""
        value = self._value(row, name, where)
        place = f"{where}.{column}" if where else column
        if not isinstance(value, str):
            raise _wrong_type(place, value, "a string")
        if not value.isascii():
            _refuse_surrogates(place, value)
        return value

    # Pre-tokenised rows.

    def _token_row(self, row: Mapping[str, Any]) -> TokenRow:
        tokens = self._integers(row, "input_ids")
        if tokens.size == 0:
            raise BadRow(Reason.EMPTY_RESPONSE, f"{self.column('input_ids')} is an empty list")
        self._refuse_padding(row, len(tokens))
        given = [name for name in ("labels", "supervised_mask") if row.get(self.column(name)) is not None]
        if len(given) != 1:
            found = "both are given" if given else "neither is given"
            raise BadRow(
                Reason.MISSING_FIELD,
                f"{found}; one of {self.column('labels')} and {self.column('supervised_mask')} is needed",
            )
        values = self._per_token(row, given[0], len(tokens), allow_bool=given[0] == "supervised_mask")
        column = self.column(given[0])
        if given[0] == "labels":
            mask = values != IGNORE_INDEX
            allowed = f"{IGNORE_INDEX} or the token at the same position (labels are not shifted)"
            bad = np.flatnonzero(mask & (values != tokens))
        else:
            mask = values == 1
            allowed = "0 or 1 (false or true)"
            bad = np.flatnonzero((values != 0) & (values != 1))
        if bad.size:
            raise BadRow(Reason.INVALID_LABEL, f"{column}[{bad[0]}] is {values[bad[0]]}; allowed: {allowed}")
        return TokenRow(tokens, mask)

    def _refuse_padding(self, row: Mapping[str, Any], num_tokens: int) -> None:
        """Samples are packed one behind the other: padding in a row would be context like any other token."""
        column = self.column("attention_mask")
        if row.get(column) is None:
            return
        values = self._per_token(row, "attention_mask", num_tokens, allow_bool=True)
        bad = np.flatnonzero(values != 1)
        if bad.size:
            raise BadRow(
                Reason.INVALID_ATTENTION_MASK,
                f"{column}[{bad[0]}] is {values[bad[0]]}; allowed: 1 everywhere, or no {column}. Take the "
                "padding off: every token of a row is seen by those after it",
            )

    def _per_token(
        self, row: Mapping[str, Any], name: str, num_tokens: int, allow_bool: bool
    ) -> npt.NDArray[np.int64]:
        values = self._integers(row, name, allow_bool)
        if len(values) != num_tokens:
            found = f"{self.column(name)} has {len(values)} entries"
            raise BadRow(
                Reason.LENGTH_MISMATCH, f"{found}, {self.column('input_ids')} has {num_tokens}; one per token"
            )
        return values

    def _integers(self, row: Mapping[str, Any], name: str, allow_bool: bool = False) -> npt.NDArray[np.int64]:
        values = self._value(row, name)
        column = self.column(name)
        if not isinstance(values, list):
            raise _wrong_type(column, values, "a list of integers")
        allowed = (int, bool) if allow_bool else (int,)
        for i, value in enumerate(values):
            if type(value) not in allowed:
                raise _wrong_type(f"{column}[{i}]", value, "an integer")
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            raise BadRow(Reason.INVALID_TOKEN, f"{column} holds a number beyond 64 bits") from None


def transposed(value: Any) -> Any:
    """A struct of equally long lists, as `datasets` stores a list of structs, as that list; else `value`."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(short(name, 40)[1:-1] for name in list(row)[:12]) or "none"


def _wrong_type(place: str, value: Any, wanted: str) -> BadRow:
    return BadRow(Reason.WRONG_TYPE, f"{place} is {kind_of(value)}: {short(value)}; it must be {wanted}")


def _refuse_surrogates(place: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            Reason.LONE_SURROGATE,
            f"{place} holds half of a surrogate pair ({value[error.start]!a}) at character "
            f"{error.start + 1}; that is no text",
        ) from None


def _check_turns(turns: Sequence[tuple[str, str]]) -> None:
    """At least one assistant turn; only a system turn may be empty."""
    if not any(role == "assistant" for role, _ in turns):
        found = ", ".join(role for role, _ in turns[:8]) or "no turn at all"
        raise BadRow(Reason.NO_ASSISTANT_TURN, f"no assistant turn, so nothing to train on (found: {found})")
    for i, (role, content) in enumerate(turns):
        if role == "system" or not is_blank(content):
            continue
        found = "white space or invisible characters only" if content else "empty"
        if role == "assistant":
            raise BadRow(Reason.EMPTY_RESPONSE, f"the response (turn {i + 1}) is {found}")
        raise BadRow(Reason.EMPTY_PROMPT, f"the prompt (turn {i + 1}) is {found}")
