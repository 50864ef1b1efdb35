"""A conversation, and which of its turns are trained on, with what weight.

What is not covered: where a conversation comes from (`turns.py`) and how it becomes text (`data/encode`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from versatune_ds.data.rows.reasons import BadRow, Reason
from versatune_ds.foundations.text import is_blank

THOUGHTS = re.compile(
    r"<(think|thinking|thoughts?|seed:think)>.*?</\1>\s*|\[THINK\].*?\[/THINK\]\s*"
    r"|<\|begin_of_thought\|>.*?<\|end_of_thought\|>\s*|\A(?:(?!<think>).)*?</think>\s*",
    re.DOTALL,
)
"""Thoughts within a text, with their tags; also those whose first tag stood in the prompt."""
TAGS = re.compile(r"</?(?:think(?:ing)?|thoughts?|seed:think)>|\[/?THINK\]|<\|(?:begin|end)_of_thought\|>")


class Turn(NamedTuple):
    role: str
    """system, developer, user, assistant, or tool (the result of a call)."""
    content: str
    reasoning: str = ""
    """Thoughts of an assistant turn that came in a field of their own; others stand in `content`."""
    calls: tuple[dict[str, Any], ...] = ()
    """Of an assistant: `{"type": "function", "function": {"name": ..., "arguments": {...}}, ...}`."""
    weight: float | None = None
    """Factor in the loss; 0: context only; None: nothing is said, so 1 for an assistant turn."""
    is_open: bool = False
    """A beginning that is continued: its stop token is not trained on."""
    about: Mapping[str, str] = {}
    """Of a tool's result: `name` and `tool_call_id`, where given."""

    @property
    def is_trained(self) -> bool:
        """Whether its text is trained on."""
        return self.role == "assistant" and self.weight != 0


@dataclass(frozen=True)
class Conversation:
    """Turns, at least one of them an assistant's, and what the template is to know beside them."""

    turns: tuple[Turn, ...]
    """Given as turns, or as (role, content)."""
    tools: tuple[Any, ...] = ()
    """JSON schemas of the functions on offer."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template."""
    weight: float | None = None
    """Factor of all turns."""
    notes: frozenset[str] = frozenset()
    """What is to be counted, see `cache/summary.py`."""
    unused: frozenset[str] = frozenset()
    """Fields of turns that are not read."""
    masks_thoughts: bool = False
    """Thoughts are context."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(Turn(*turn) for turn in self.turns))


def to_train(chat: Conversation, reasoning: str, train_on: str) -> Conversation:
    """The conversation with the weight that each assistant turn has in training.

    Raises:
        BadRow: nothing is left to train on, or nothing of a turn is left without its thoughts.
    """
    said = [turn.weight for turn in chat.turns if turn.role == "assistant"]
    if (reasoning, train_on, chat.weight) == ("keep", "all_turns", None) and said == [None] * len(said):
        return chat
    factor = 1.0 if chat.weight is None else chat.weight
    unsaid = 0.0 if train_on == "flagged" and chat.weight is None else 1.0
    last = max(i for i, turn in enumerate(chat.turns) if turn.role == "assistant")
    turns, notes = [], set(chat.notes)
    for i, turn in enumerate(chat.turns):
        if turn.role == "assistant":
            weight = factor * (unsaid if turn.weight is None else turn.weight)
            weight = 0.0 if train_on == "last_turn" and i != last else weight
            notes |= {"untrained"} if weight == 0 else {"weighted"} if weight != 1 else set()
            turn = turn._replace(weight=weight)
            if reasoning == "drop":
                turn = _without_thoughts(turn, i)
        turns.append(turn)
    if not any(turn.is_trained for turn in turns):
        raise BadRow(Reason.SWITCHED_OFF, "by its flags and data.train_on nothing of the row is trained on")
    return replace(
        chat, turns=tuple(turns), notes=frozenset(notes), weight=None, masks_thoughts=reasoning == "mask"
    )


def _without_thoughts(turn: Turn, i: int) -> Turn:
    content = THOUGHTS.sub("", turn.content) if TAGS.search(turn.content) else turn.content
    if is_blank(content) and not turn.calls:
        raise BadRow(
            Reason.EMPTY_RESPONSE, f"the response (turn {i + 1}) is thoughts only; data.reasoning drops them"
        )
    return turn._replace(reasoning="", content=content)
