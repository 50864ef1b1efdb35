"""Reading the small JSON files that a run is given, with errors that name the file; numbers for JSON.

What is not covered: what the values mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from versatune_ds.foundations.errors import DataError


def finite(value: Any) -> float | None:
    """`value` as a Python float; None when it is None, NaN or infinite, which JSON has no numbers for."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


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


def require_format(raw: Mapping[str, Any], name: str, version: int, path: Path, cure: str) -> None:
    """Raise DataError unless a file says that it is of this format and version."""
    found, known = (raw.get("format"), raw.get("version")), (name, version)
    if found != known:
        said, expected = (f"format {kind!r}, version {number}" for kind, number in (found, known))
        raise DataError(f"{said}; expected {expected}; {cure}", path=path)


def read_steps(path: Path, cure: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and object of each line of a JSONL file that a run wrote, a line a `step`.

    Args:
        cure: what to do when there is no such file, for the error text.

    Raises:
        DataError: no such file; with the line, where one is not JSON, has no step, or steps do not rise.
    """
    if not path.is_file():
        raise DataError(f"no such file; {cure}", path=path)
    text = path.read_bytes().removesuffix(b"\n")
    before = -1
    for number, line in enumerate(text.split(b"\n") if text else [], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise DataError(
                f"not JSON ({error}); a run that was killed may leave half a last line: remove it",
                path=path,
                line=number,
            ) from None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            raise DataError("needs `step`, a whole number", path=path, line=number)
        if step <= before:
            raise DataError(f"step {step} follows step {before}; steps must rise", path=path, line=number)
        before = step
        yield number, record


def numbers(
    raw: Any, key: str, path: Path, *, line: int | None = None, least: float = -math.inf
) -> dict[str, float]:
    """`raw` as finite numbers >= `least` by domain name; raises DataError where it is anything else."""
    if not isinstance(raw, dict):
        raise DataError(f"{key!r} must be an object of finite numbers by domain name", path=path, line=line)
    for name, value in raw.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < least:
            limit = "" if least == -math.inf else f" >= {least:g}"
            problem = f"{key} of {name} is {value!r}; expected a finite number{limit}"
            raise DataError(problem, path=path, line=line)
    return {name: float(value) for name, value in raw.items()}
