"""The picture of knowledge distributions: a stacked horizontal bar per model, as PNG.

A domain that a file does not know has no segment in its bar.

What is not covered: measuring (`versatune_ds.apps.detect`), drawing (`figures`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from versatune_ds.domain.knowledge import read_knowledge
from versatune_ds.foundations.files import write_bytes_atomic
from versatune_ds.report.figures import Stack, stacked_bars, to_png


def draw_knowledge(paths: Sequence[Path], picture: Path) -> None:
    """One bar for each knowledge.json, from top to bottom in one PNG; DataError: a file cannot be read."""
    stacks = [_stack(path) for path in paths]
    write_bytes_atomic(picture, to_png(stacked_bars(stacks, "share of generated texts")))


def _stack(path: Path) -> Stack:
    content = read_knowledge(path, "the command line")
    model, judge, texts = (content.get(key, {}) for key in ("model", "judge", "texts"))
    facts = (
        f"{texts['judged']} texts" if "judged" in texts else "",
        str(judge.get("kind", "")),
        "random weights" if model.get("weights") == "random" else "",
    )
    label = str(model.get("source", path.parent.name))
    return Stack(label, content["domains"], ", ".join(filter(None, facts)))
