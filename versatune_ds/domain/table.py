"""The domain table: the one place that knows the order of the domains.

Everything indexed by domain (weights, losses, packs, statistics) uses the ids given here. No domain is
ever told from a path or a position in a list.

What is not covered: data, weights or losses of a domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.foundations.files import canonical_hash


class DomainTable:
    """Ordered, frozen domain names; the id of a domain is its position.

    Args:
        names: at least one name, all different and not blank.

    Raises:
        ConfigError: names are missing, blank or repeated.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise ConfigError("domains.names is empty: name at least one domain")
        blank = [i for i, name in enumerate(names) if not name.strip()]
        if blank:
            raise ConfigError(f"domains.names[{blank[0]}] is blank: every domain needs a name")
        repeated = sorted({name for name in names if list(names).count(name) > 1})
        if repeated:
            raise ConfigError(f"domains.names repeats {', '.join(repeated)}: name each domain once")
        self._names = tuple(names)
        self._ids = {name: i for i, name in enumerate(self._names)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in id order."""
        return self._names

    @property
    def fingerprint(self) -> str:
        """Hash of names and order."""
        return canonical_hash(list(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"DomainTable({', '.join(self._names)})"

    def id_of(self, name: str) -> int:
        """Id of `name`; raises ConfigError naming the known domains."""
        if name not in self._ids:
            raise ConfigError(unknown_name("domain", name, self._names))
        return self._ids[name]

    def vector(self, values: Mapping[str, float], what: str) -> np.ndarray:
        """`values` by name as float64[k] in id order.

        Args:
            values: a number for every domain of the table and for no other.
            what: the setting's name, for the error text.

        Raises:
            ConfigError: a domain is missing or unknown.
        """
        for name in values:
            if name not in self._ids:
                raise ConfigError(f"{what}: {unknown_name('domain', name, self._names)}")
        missing = [name for name in self._names if name not in values]
        if missing:
            raise ConfigError(f"{what}: no value for {', '.join(missing)}; give one for every domain")
        return np.array([float(values[name]) for name in self._names], dtype=np.float64)

    def by_name(self, vector: Sequence[float] | np.ndarray) -> dict[str, float]:
        """`vector` (length k) as a plain dict by domain name, for JSON."""
        if len(vector) != len(self):
            raise ValueError(f"vector has {len(vector)} entries, the table {len(self)} domains")
        return {name: float(value) for name, value in zip(self._names, vector, strict=True)}
