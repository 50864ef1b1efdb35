"""Why a row or file cannot be used: a fixed vocabulary, the exceptions that carry it, and words for texts.

What is not covered: where the row stands (`blocks.RowPlace`), and whether it stops the work (the caller).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any


class Reason(str, Enum):
    """Why a row is not trained on: a fixed vocabulary, so that tables of different runs can be compared."""

    # The file.
    EMPTY_FILE = "empty_file"
    DAMAGED_FILE = "damaged_file"
    TRUNCATED_FILE = "truncated_file"
    WRONG_ENCODING = "wrong_encoding"
    # The row as text.
    ROW_TOO_LARGE = "row_too_large"
    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    INVALID_CSV = "invalid_csv"
    DUPLICATE_KEY = "duplicate_key"
    NOT_AN_OBJECT = "not_an_object"
    # The row against its schema.
    UNKNOWN_COLUMNS = "unknown_columns"
    OTHER_FORMAT = "other_format"
    MISSING_FIELD = "missing_field"
    NULL_FIELD = "null_field"
    WRONG_TYPE = "wrong_type"
    UNSUPPORTED_FIELD = "unsupported_field"
    UNKNOWN_ROLE = "unknown_role"
    NO_ASSISTANT_TURN = "no_assistant_turn"
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_RESPONSE = "empty_response"
    LONE_SURROGATE = "lone_surrogate"
    UNKNOWN_DOMAIN = "unknown_domain"
    LENGTH_MISMATCH = "length_mismatch"
    INVALID_TOKEN = "invalid_token"
    INVALID_LABEL = "invalid_label"
    INVALID_ATTENTION_MASK = "invalid_attention_mask"
    # The row as tokens.
    REFUSED_BY_TEMPLATE = "refused_by_template"
    STOP_TOKEN_IN_TEXT = "stop_token_in_text"
    NO_STOP_TOKEN = "no_stop_token"
    NOTHING_SUPERVISED = "nothing_supervised"
    LOST_TEXT = "lost_text"
    BLANK_TEXT = "blank_text"
    # By `data.train_on` and flags, whatever `data.on_bad_row` says.
    SWITCHED_OFF = "switched_off"
    # By `data.overlong`, whatever `data.on_bad_row` says.
    OVERLONG = "overlong"
    OVERLONG_NOTHING_LEFT = "overlong_nothing_left"


WHOLE_FILE = (Reason.EMPTY_FILE, Reason.DAMAGED_FILE, Reason.TRUNCATED_FILE, Reason.WRONG_ENCODING)
"""Reasons that concern a file, or the rest of it from a place on, and not one row."""
NEVER_FATAL = (Reason.BLANK_TEXT, Reason.SWITCHED_OFF, Reason.OVERLONG, Reason.OVERLONG_NOTHING_LEFT)
"""Reasons that no setting of `data.on_bad_row` stops at."""


class BadRow(Exception):
    """A row that cannot be used: what was found and what is allowed, without its place."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class FileDamage(BadRow):
    """The file cannot be read on from here, or at all.

    Args:
        line: on which the row in question begins, where that is known.
    """

    def __init__(self, reason: Reason, message: str, line: int | None = None) -> None:
        super().__init__(reason, message)
        self.line = line


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """What to say of a row that cannot be decoded."""
    found = error.object[error.start : error.start + 4].hex(" ")
    return BadRow(
        Reason.INVALID_UTF8,
        f"bytes {found} at byte {error.start} of the row are not UTF-8; only UTF-8 is allowed",
    )


def kind_of(value: Any) -> str:
    """A JSON word for the type of `value`, for error texts."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean", int: "a number", float: "a number", str: "a string",
        list: "a list", dict: "an object", bytes: "bytes",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def short(value: Any, limit: int = 60) -> str:
    """`value` on one line in printable ASCII, cut to about `limit` characters: safe on any terminal."""
    if isinstance(value, bytes):
        text = ascii(value[: limit + 1])[1:]
    elif isinstance(value, str):
        text = ascii(value[: limit + 1])
    else:
        try:
            text = ascii(value)
        except (RecursionError, ValueError):
            text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[:limit] + "..."


def wrong_type(place: str, value: Any, wanted: str) -> BadRow:
    """What to say of a value of another type than `wanted`."""
    return BadRow(Reason.WRONG_TYPE, f"{place} is {kind_of(value)}: {short(value)}; it must be {wanted}")


def column_names(row: Iterable[str]) -> str:
    """The first names of a row's fields, for error texts."""
    return ", ".join(short(name, 40)[1:-1] for name in list(row)[:12]) or "none"


@functools.lru_cache(maxsize=4096)
def word(name: str) -> str:
    """A name however it is spelled: lossMask, loss-mask and Loss_Mask are one."""
    return re.sub(r"[-_\s]", "", name).lower()


def word_set(names: str) -> frozenset[str]:
    """`word` of each of these names."""
    return frozenset(map(word, names.split()))


def from_json_text(value: Any, beginnings: str) -> Any:
    """The value that a text is the JSON of, if it begins with one of these characters; else `value`."""
    if not isinstance(value, str) or value.lstrip()[:1] not in tuple(beginnings):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def transposed(value: Any) -> Any:
    """A struct of equally long lists, as `datasets` stores a list of structs, as that list; else `value`."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def refuse_surrogates(place: str, value: str) -> None:
    """Raise BadRow where a text holds half of a surrogate pair: it is no text."""
    if value.isascii():
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            Reason.LONE_SURROGATE,
            f"{place} holds half of a surrogate pair ({value[error.start]!a}) at character "
            f"{error.start + 1}; that is no text",
        ) from None
