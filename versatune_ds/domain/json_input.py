"""Reading the small JSON files that a run is given, with errors that name the file.

What is not covered: what the values mean (`reference.py`, `knowledge.py`).
"""

from __future__ import annotations

import json
import math
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
        raise DataError(f"not JSON: {error}", path=path) from None
    if not isinstance(raw, dict):
        raise DataError(f"holds a {type(raw).__name__}; expected an object", path=path)
    return raw


def numbers(raw: Any, key: str, path: Path) -> dict[str, float]:
    """`raw` as finite numbers by domain name; raises DataError where it is anything else."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if not isinstance(raw, dict) or not all(is_number(value) for value in raw.values()):
        raise DataError(f"{key!r} must be an object of finite numbers by domain name", path=path)
    return {name: float(value) for name, value in raw.items()}
