"""What a reader sees of a text: is anything there? And tables and commands for a terminal.

Unicode gives every character a category; spaces, controls and format characters leave no mark. Some letters
and marks leave none either: the Default_Ignorable_Code_Point property (Unicode Standard, section 5.21), which
Python does not know, and the braille blank. Unassigned and private characters count as seen: a Python may be
older than an emoji.

What is not covered: fonts, and text in the colour of its background.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence

_LEAVE_NO_MARK = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp"))
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
"""Default ignorable characters of other categories, and U+2800."""


def is_blank(text: str) -> bool:
    """True when a text shows nothing: empty, or white space, controls and invisible characters only."""
    return all(unicodedata.category(c) in _LEAVE_NO_MARK or _IGNORABLE.match(c) for c in text)


def in_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: cells two spaces apart, columns that hold a number to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    signs = [">" if any(cell.lstrip("+-")[:1].isdigit() for cell in column) else "<" for column in columns]
    for row in rows:
        cells = (f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True))
        yield "  ".join(cells).rstrip()


def listed(texts: Sequence[str], most: int) -> str:
    """`a, b, c and 5 more`: the first `most` of them, and how many there are beside these."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def divisors(number: int) -> str:
    """The numbers that divide a number, for an error text."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def command(verb: str, *words: object) -> str:
    """A command of this program that can be pasted into a shell."""
    return shlex.join(["versatune-ds", verb, *map(str, words)])
