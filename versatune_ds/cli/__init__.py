"""Floor 10: one short file per verb of the `versatune-ds` command; here is what several declare alike.

A verb is a module with `add_arguments(parser)` and `run(args)`, which returns the exit code where that is not
0. The first line of its docstring says what it is for in the list of all verbs; the whole of it stands above
its own `--help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from versatune_ds.foundations.files import expanded


def add_settings(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and overrides, of a verb that reads a run's settings."""
    parser.add_argument(
        "--config", required=True, type=place, metavar="FILE", help="YAML settings; see configs/"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE"
    )


def place(text: str) -> Path:
    """An argument's type: a path, its `~` and `$NAME` filled in (the shell leaves them in --out=~/runs)."""
    return Path(place_text(text))


def place_text(text: str) -> str:
    """An argument's type: a path or a name, as text, with the same filled in."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: give {least} or more")
        return value

    return number
