"""The errors that users see: what was found, what is allowed, what to do.

Every error a user can cause derives from `VersaTuneError`; the command line prints its text without a
traceback and leaves with its `exit_code`. `assert` is kept for our own invariants.

What is not covered: errors of the stand-alone kernel package, which has its own `KernelError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from versatune_ds.foundations import constants


class VersaTuneError(Exception):
    """Base of all errors with a message written for the user."""

    exit_code: int = constants.EXIT_FAILURE


class ConfigError(VersaTuneError):
    """A setting is missing, unknown, of the wrong type, or contradicts another one."""

    exit_code = constants.EXIT_USAGE


class DataError(VersaTuneError):
    """Input data cannot be used as it is.

    Args:
        message: what was found, what is allowed, what to do.
        path: the file it was found in.
        line: line number, from 1, for line-based files.
        row: row number, from 1, for files with rows or records but no lines (Parquet, JSON lists).
    """

    exit_code = constants.EXIT_DATA

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        line: int | None = None,
        row: int | None = None,
    ) -> None:
        self.path = None if path is None else str(path)
        self.line = line
        self.row = row
        place = self.path or ""
        if line is not None:
            place += f":{line}"
        if row is not None:
            place += f" row {row}"
        self.reason = message
        super().__init__(f"{place}: {message}" if place else message)


class StateError(VersaTuneError):
    """A cache, checkpoint or other saved state is missing, damaged, or belongs to something else."""

    exit_code = constants.EXIT_STATE


class SaveError(VersaTuneError):
    """A checkpoint could not be written."""

    exit_code = constants.EXIT_SAVE


class DivergenceError(VersaTuneError):
    """Too many steps in a row had to be skipped: their losses or gradients were not finite, or leapt up."""

    exit_code = constants.EXIT_DIVERGED


class PeerLostError(VersaTuneError):
    """Another rank is gone, and this one cannot go on alone.

    Args:
        message: which one, why as far as it is known, what to do.
        ranks: the ranks that are gone; empty when it cannot be told.
        exit_code: that of the lost rank's own error, if it posted one.
    """

    def __init__(self, message: str, ranks: tuple[int, ...], exit_code: int) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.exit_code = exit_code


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Text for an unknown name: the nearest known one, if any is near, and all known ones."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})"
