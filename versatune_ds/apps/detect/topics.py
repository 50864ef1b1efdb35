"""What well-known domains are about, in words: texts of one more source for the embedded judge.

A judge that has seen one corpus a domain learns that corpus. Some topics and sentences (`topics.yaml`) cost
nothing, come from no corpus, and tell what else belongs to a domain. Names that are not known there have
none; `detect.judge.topics` gives or replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml


def topics_of(names: Sequence[str], given: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Texts of each domain, in the order of `names`; none for a name that is neither known nor given.

    Science has those of mathematics too, where that is no domain of its own.
    """
    text = (Path(__file__).parent / "topics.yaml").read_text(encoding="utf-8")
    known = {name: about for about in yaml.safe_load(text) for name in about["names"]}
    called, maths = {name.lower() for name in names}, known["maths"]
    found = []
    for name in names:
        about = known.get(name.lower(), {"topics": [], "sentences": []})
        texts = list(given.get(name, [*about["topics"], *about["sentences"]]))
        if name.lower() == "science" and name not in given and not called & set(maths["names"]):
            texts += [*maths["topics"], *maths["sentences"]]
        found.append(texts)
    return found
