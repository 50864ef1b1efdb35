"""Reading the small JSON files that a run is given, with errors that name the file.

What is not covered: what the values mean (`reference.py`, `knowledge.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from versatune_ds.foundations.errors import DataError


def read_object(path: Path, setting: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        setting: what names the file, for the error text.

    Raises:
        DataError: the file is missing, not JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise DataError(f"no such file; {setting} names it", path=path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"not JSON, or cut short ({error}); make it again", path=path) from None
    if not isinstance(raw, dict):
        raise DataError(f"holds a {type(raw).__name__}; expected an object", path=path)
    return raw


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line of a JSONL file that a run wrote.

    Raises:
        DataError: with the line, where one is not JSON.
    """
    text = path.read_bytes().removesuffix(b"\n")
    for number, line in enumerate(text.split(b"\n") if text else [], start=1):
        try:
            yield number, json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise DataError(
                f"not JSON ({error}); a run that was killed may leave half a last line: remove it",
                path=path,
                line=number,
            ) from None


def numbers(raw: Any, key: str, path: Path) -> dict[str, float]:
    """`raw` as finite numbers by domain name; raises DataError where it is anything else."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if not isinstance(raw, dict) or not all(is_number(value) for value in raw.values()):
        raise DataError(f"{key!r} must be an object of finite numbers by domain name", path=path)
    return {name: float(value) for name, value in raw.items()}
