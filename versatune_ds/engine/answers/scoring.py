"""How an answer is scored against its reference: 0 to 1.

    exact    both texts are the same, but for white space
    number   the last number in both is the same: 1,000 = 1000 = 1000.0; $5, 50 % and (-3) are 5, 50 and -3
    label    the first label found in both is the same; the labels are the references of the domain's held-out
             samples, found as whole words, whatever their case
    user's   a function (answer, reference) -> bool or number from 0 to 1

Every scorer is tried on each reference against itself before the first step, so that a function that cannot
work, or a reference without a number, is found then. A function that fails later on some answer leaves that
answer without a score, which is said and counted: a run is not ended for it.

What is not covered: decimal commas (1,5 is a list of two numbers), fractions and numbers in words.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from versatune_ds.config.answers import FUNCTION, SCORES
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import expanded
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

Score = Callable[[str, str], Any]
"""(answer, reference) -> a number from 0 to 1."""

NUMBER = re.compile(
    r"([-\u2212]?)((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)(?:[eE]([-+]?\d{1,4})(?!\d))?"
)
MAX_LABELS = 100
"""More different references than this are no labels."""


def normalized(text: str) -> str:
    """Without white space at the ends, and with single blanks inside."""
    return " ".join(text.split())


def exact(answer: str, reference: str) -> bool:
    """Both are the same but for white space."""
    return normalized(answer) == normalized(reference)


def last_number(text: str) -> Decimal | None:
    """The last number of a text. A sign counts where nothing stands before it that it could join: 3-4 ends
    with 4."""
    found = None
    for match in NUMBER.finditer(text):
        before = text[match.start() - 1 : match.start()]
        sign = "-" if match[1] and not before.isalnum() and before not in (")", "]") else ""
        found = Decimal(f"{sign}{match[2].replace(',', '')}e{match[3] or 0}")
    return found


def number(answer: str, reference: str) -> bool:
    """The last numbers of both are there and equal."""
    ours = last_number(answer)
    return ours is not None and ours == last_number(reference)


def label(labels: Iterable[str]) -> Score:
    """A scorer by the first label in a text; at the same place the longest one counts."""
    known = sorted({normalized(text).casefold() for text in labels}, key=lambda text: (-len(text), text))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, known))})(?!\w)")

    def first(text: str) -> str | None:
        match = pattern.search(normalized(text).casefold())
        return match and match[0]

    def score(answer: str, reference: str) -> bool:
        return first(answer) is not None and first(answer) == normalized(reference).casefold()

    return score


def user_function(name: str) -> Score:
    """The function that `module:function` or `path.py:function` names; its file or module is run.

    Raises:
        ConfigError: it cannot be found or imported.
    """
    match = FUNCTION.fullmatch(name)
    assert match is not None
    place, function = match.groups()
    try:
        if place.endswith(".py"):
            path = Path(expanded(place))
            spec = importlib.util.spec_from_file_location(f"versatune_score_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # as an import does: dataclasses look there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: Score = getattr(module, function)
    except Exception as error:  # whatever the user's code raises as it is run
        raise ConfigError(
            f"evaluation.generate.score {name}: {type(error).__name__}: {error}. Give a function of a file "
            "(path.py:function) or of an installed module (module:function)"
        ) from error
    if not callable(found):
        raise ConfigError(f"evaluation.generate.score {name} is {found!r}; give a function")
    return found


def build_scorer(name: str, domain: str, references: Callable[[], Iterable[str]]) -> Score:
    """The scorer of a domain.

    Args:
        name: `evaluation.generate.score`.
        references: gives those of all held-out samples of the domain.

    Raises:
        ConfigError: no such function, or references that are no labels.
    """
    if name not in SCORES:
        return user_function(name)
    if name != "label":
        return exact if name == "exact" else number
    labels: set[str] = set()
    for text in references():
        labels.add(normalized(text))
        if len(labels) > MAX_LABELS:
            raise ConfigError(
                f"evaluation.generate.score label: {domain} has more than {MAX_LABELS} different held-out "
                "answers, which are no labels; use exact, number or a function"
            )
    return label(labels)


def checked(score: Score, answer: str, reference: str) -> float:
    """The score as a number; ValueError where it is something else, or not from 0 to 1."""
    value = score(answer, reference)
    if isinstance(value, str) or not 0.0 <= (as_number := float(value)) <= 1.0 or math.isnan(as_number):
        raise ValueError(f"gives {value!r}; a number from 0 to 1 is needed")
    return as_number


def try_on_reference(score: Score, name: str, place: str, reference: str) -> None:
    """Score a reference against itself; ConfigError: that fails, or a scorer of ours gives it less than 1."""
    try:
        value = checked(score, reference, reference)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"evaluation.generate.score {name}, called with the reference of {place} as answer and reference "
            f"({reference[:80]!r}): {type(error).__name__}: {error}. Mend the function"
        ) from error
    if name in SCORES and value < 1:
        raise ConfigError(
            f"evaluation.generate.score {name}: the reference of {place} ({reference[:80]!r}) holds no "
            f"{name}; use another score for its domain, or mend the row"
        )
