"""What rows say about training: flags and weights of turns and of samples, in the words that people use.

Their case, dashes and underscores do not matter. 0 or false: context only; 1 or true: trained on; other
numbers are factors of the tokens in the loss. Words of `MASKED` mean the contrary. `mask` alone is used both
ways: it counts only where 0 stands at every turn that is not the assistant's.

What is not covered: what follows from them (`conversation.to_train`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from versatune_ds.data.chat.conversation import Turn
from versatune_ds.data.rows.reasons import BadRow, Reason, from_json_text, word, word_set, wrong_type

TRAINED = word_set(
    "weight loss_weight turn_weight token_weight loss_scale loss loss_flag is_loss has_loss use_loss "
    "compute_loss calculate_loss include_in_loss train trained training trainable is_train is_trainable "
    "do_train train_on_turn train_on loss_mask train_mask step_loss_mask supervise supervised learn learnable"
)
MASKED = word_set(
    "masked is_masked mask_loss ignore ignored ignore_loss no_loss no_train dont_train do_not_train"
)
FLAGS = TRAINED | MASKED
"""Fields of turns, by `word`."""
UNCLEAR = "mask"
OF_ROWS = word_set(
    "weight sample_weight example_weight row_weight loss_weight loss_scale loss train trainable "
    "train_on_turn loss_mask turn_loss_mask train_mask step_loss_mask supervise supervised weights "
    "turn_weights message_weights loss_weights loss_masks train_masks masked ignore_loss no_loss"
) | {UNCLEAR}
"""Columns: a number for the whole row, or a list with one for each turn, or for each assistant turn."""
_SOUNDS_SO = re.compile(r"(?<![a-z])(?:loss|train|mask|weight|supervis|learn)")
WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "on": 1.0, "off": 0.0}


def weight_of(fields: Mapping[str, Any], place: str, names: Container[str] = FLAGS) -> float | None:
    """The weight that flags agree on, None without any; BadRow where they are no weights, or differ."""
    found = {
        name: _number(value, f"{place}{name}", word(name))
        for name, value in fields.items()
        if word(name) in names
    }
    return _agreed({name: value for name, value in found.items() if value is not None}, place)


def with_row_flags(
    row: Mapping[str, Any], turns: Sequence[Turn], masks: Sequence[Any], ours: Callable[[str], str]
) -> tuple[float | None, list[Turn]]:
    """(weight of the row, turns with the weights that lists of the row give them).

    Args:
        masks: the field `mask` of each turn, which its place alone cannot tell.
        ours: our name of a column of the file.

    Raises:
        BadRow: as `weight_of`; or a list is not as long as there are turns.
    """
    singles: dict[str, Any] = {}
    answers = sum(turn.role == "assistant" for turn in turns)
    given: list[dict[str, Any]] = [{} for _ in turns]
    if any(mask is not None for mask in masks):
        _add(given, turns, UNCLEAR, masks)
    for column, value in row.items():
        name = ours(column)
        if word(name) not in OF_ROWS:
            if isinstance(value, list) and len(value) in (len(turns), answers):
                refuse_unclear(column, value)
            continue
        value, is_unclear = from_json_text(value, "["), word(name) == UNCLEAR
        if isinstance(value, list):
            _add(given, turns, name, value)
        elif value is None or (is_unclear and isinstance(value, str) and value.lower() == "user"):
            continue  # NeMo's `mask: User`: as we do anyway
        elif is_unclear or (word(name) == "loss" and value not in (0, 1, "true", "false")):
            raise _unclear(column)
        else:
            singles[name] = value
    weighted = []
    for i, (turn, flags) in enumerate(zip(turns, given, strict=True)):
        said = weight_of(flags, f"turn {i + 1}: ", OF_ROWS) if turn.role == "assistant" else None
        both = {name: w for name, w in (("turn", turn.weight), ("list", said)) if w is not None}
        weighted.append(turn._replace(weight=_agreed(both, f"turn {i + 1}: ")))
    return weight_of(singles, "", OF_ROWS), weighted


def _add(given: list[dict[str, Any]], turns: Sequence[Turn], name: str, values: Sequence[Any]) -> None:
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if len(values) not in (len(turns), len(answers)):
        raise BadRow(
            Reason.LENGTH_MISMATCH,
            f"{name} has {len(values)} entries; it must have one for each of {len(turns)} turns, or for each "
            f"of {len(answers)} assistant turns",
        )
    if word(name) == UNCLEAR:
        others = [v for i, v in enumerate(values) if i not in answers] if len(values) == len(turns) else []
        if not others or any(value is None or value for value in others):
            raise _unclear(name)
    for i, value in zip(range(len(turns)) if len(values) == len(turns) else answers, values, strict=True):
        given[i][name] = value


def refuse_unclear(name: str, values: Sequence[Any], place: str = "") -> None:
    """Refuse 0 and 1 under a name that is none of ours and sounds as if it said what is trained on."""
    are_flags = bool(values) and all(type(value) in (bool, int) and value in (0, 1) for value in values)
    if are_flags and _SOUNDS_SO.search(name.lower()):
        raise _unclear(f"{place}{name}")


def _unclear(name: str) -> BadRow:
    return BadRow(
        Reason.UNSUPPORTED_FIELD,
        f"{name} does not say what is trained on; name it loss_mask or weight (1: trained on), or masked (1: "
        "not), or take it out",
    )


def _number(value: Any, place: str, name: str) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = WORDS[value.lower()] if value.lower() in WORDS else float(value)
        except ValueError:
            raise wrong_type(place, value, "a number or true or false") from None
    if not isinstance(value, bool | int | float):
        raise wrong_type(place, value, "a number or true or false")
    if name in MASKED:
        value = 1 - value if value in (0, 1) else math.nan
    if not (math.isfinite(value) and value >= 0):
        raise BadRow(
            Reason.INVALID_LABEL, f"{place} is {value}; allowed: {'0 or 1' if name in MASKED else '>= 0'}"
        )
    return float(value)


def _agreed(found: Mapping[str, float], place: str) -> float | None:
    """0 if any is 0; else the one that is not 1."""
    if not found:
        return None
    if 0 in found.values():
        return 0.0
    weights = {value for value in found.values() if value != 1}
    if len(weights) > 1:
        said = ", ".join(f"{name} {value:g}" for name, value in found.items())
        raise BadRow(Reason.INVALID_LABEL, f"{place}different weights ({said}); give one")
    return weights.pop() if weights else 1.0
