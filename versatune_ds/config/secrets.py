"""Secrets do not belong into settings: those are written to the run folder, trackers and the report.

`find_secret` looks for keys that are named like one, addresses with a password in them, and tokens of known
services. The text of an error names the place and never the value.

`redacted` takes them out of what other packages say.

What is not covered: a secret that looks like an ordinary word.
"""

from __future__ import annotations

import os
import re
from typing import Any

SECRET_KEY = re.compile(r"(?i)(^|_)(api_?key|password|passwd|secret|(auth|access|hf|hub)_?token)$")
SECRET_VALUE = re.compile(
    r"""
    [a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@     # user:password@ in an address
    | \bhf_[A-Za-z0-9]{30,}                     # Hugging Face
    | \b(ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{30,}
    | \bAKIA[A-Z0-9]{16}\b                      # AWS
    | \bsk-[A-Za-z0-9_-]{30,}
    """,
    re.VERBOSE,
)


LEAST_SECRET_CHARS = 8


def redacted(text: str) -> str:
    """A text without tokens of known services, and values of variables that are named like a secret."""
    for name, value in os.environ.items():
        if SECRET_KEY.search(name) and len(value) >= LEAST_SECRET_CHARS:
            text = text.replace(value, "***")
    return SECRET_VALUE.sub("***", text)


def find_secret(value: Any, place: str = "") -> str | None:
    """Place of the first secret in nested settings, dotted; None if there is none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            where = f"{place}.{key}" if place else str(key)
            if isinstance(inner, str) and inner and SECRET_KEY.search(str(key)):
                return where
            found = find_secret(inner, where)
            if found is not None:
                return found
        return None
    if isinstance(value, list | tuple):
        places = (find_secret(inner, f"{place}[{i}]") for i, inner in enumerate(value))
        return next((found for found in places if found is not None), None)
    return place if SECRET_VALUE.search(str(value)) else None
