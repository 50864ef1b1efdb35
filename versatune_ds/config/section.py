"""What every section of the settings shares: the types of places, and how problems are found, all at once.

What is not covered: the sections themselves (`config/schema.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator

from versatune_ds.foundations.files import expanded


def _expand(value: Any) -> Any:
    return expanded(str(value)) if isinstance(value, str | Path) else value


Place = Annotated[Path, BeforeValidator(_expand)]
"""A path, its `~` and `$NAME` filled in."""
PlaceText = Annotated[str, BeforeValidator(_expand)]
"""A path or a name, as text, with the same filled in."""


PREPARING = {"for": "prepare"}
"""Context of a validation that leaves out `problems`: data can be prepared with them."""


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

    def data_problems(self) -> Iterator[str]:
        """What does not hold together so that no data could be prepared either, a sentence each."""
        return iter(())

    def problems(self) -> Iterator[str]:
        """What else does not hold together, a sentence each."""
        return iter(())

    def finders(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """All that find problems; each by itself, as one may need a part of the settings that is unsound."""
        return self.data_problems, self.problems

    @model_validator(mode="after")
    def _hold_together(self, info: ValidationInfo) -> Section:
        finders = (self.data_problems,) if info.context is PREPARING else self.finders()
        if found := [problem for find in finders for problem in find()]:
            raise ValueError("\n".join(found))
        return self
