"""The settings of another trainer while they become ours: each key is asked for once, the rest is known.

What is not covered: what the keys mean (`training.py`, `datasets.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from versatune_ds.config.secrets import find_secret

NO_COUNTERPART = "there is no such setting here"
Left = tuple[str, str, str]
"""What was not carried over: key, value as text, reason."""


class Foreign:
    """Keys and values of another trainer, and what has become of them.

    Args:
        values: the settings; null counts as not given.
        names: the trainer's own name -> the one that it is asked for by, where they differ.
        defaults: what the trainer takes where nothing is given, by the latter names.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        names: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        known = dict(names or {})
        self._values = {known.get(key, key): value for key, value in values.items() if value is not None}
        self._names = {known.get(key, key): key for key in values}
        self._defaults = dict(defaults or {})
        self.ours: dict[str, dict[str, Any]] = {}
        """Our settings so far: section -> key -> value."""
        self.notes: dict[str, list[str]] = {}
        """Section -> lines that stand above it: what is not quite the same."""
        self.left: list[Left] = []

    def take(self, key: str) -> Any:
        """The value of a key, or the trainer's default; the key is then dealt with."""
        default = self._defaults.pop(key, None)
        return self._values.pop(key, default)

    def is_on(self, key: str) -> bool:
        """`take` of a switch; YAML of other trainers writes true also as yes and on."""
        return self.take(key) in (True, "true", "True", "yes", "on")

    def peek(self, key: str) -> Any:
        """The value of a key, which stays to be taken."""
        return self._values.get(key, self._defaults.get(key))

    def put(self, key: str, value: Any) -> None:
        """Give a key a value, as if it had been given."""
        self._values[key] = value

    def leave(self, key: str, value: Any, why: str) -> None:
        """Say that something was not carried over; a value that looks like a secret is not repeated."""
        name = self._names.get(key, key)
        secret = find_secret({name: value}) is not None
        text = "..." if secret else " ".join(str(value).split())
        self.left.append((name, text, "a secret, which belongs into the environment" if secret else why))

    def leave_all(self, reasons: Mapping[str, str]) -> None:
        """`leave` those of these keys that are given and not off."""
        for key, why in reasons.items():
            value = self.take(key)
            if value not in (None, False, "", [], {}, "no", "off"):
                self.leave(key, value, why)

    def rest(self, ignored: Iterable[str]) -> None:
        """At the end: what nobody asked for, but for keys that change nothing about what is trained."""
        for key in ignored:
            self._values.pop(key, None)
        for key in list(self._values):
            self.leave(key, self._values.pop(key), NO_COUNTERPART)

    def hand_over(self, given: Foreign, place: str) -> None:
        """At the end of an entry of `given`: it says what was not carried over, with the entry's place."""
        self.rest(())
        for key, value, why in self.left:
            given.leave(f"{place}.{key}", value, why)

    def set(self, section: str, **keys: Any) -> None:
        """Give our settings; None: leave the default."""
        given = {key: value for key, value in keys.items() if value is not None}
        self.ours.setdefault(section, {}).update(given)

    def note(self, section: str, text: str) -> None:
        self.notes.setdefault(section, []).append(text)
