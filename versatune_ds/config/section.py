"""What every section of the settings shares.

What is not covered: the sections themselves (`config/schema.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from versatune_ds.foundations.files import expanded


def _expand(value: Any) -> Any:
    return expanded(str(value)) if isinstance(value, str | Path) else value


Place = Annotated[Path, BeforeValidator(_expand)]
"""A path, its `~` and `$NAME` filled in."""
PlaceText = Annotated[str, BeforeValidator(_expand)]
"""A path or a name, as text, with the same filled in."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, the docstring under a field is its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
