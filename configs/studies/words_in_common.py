"""A score of answers for smollm2.yaml: words in common."""

from __future__ import annotations


def f1(answer: str, reference: str) -> float:
    """2 n / (words of the answer + words of the reference), n of which are in both."""
    ours, theirs = answer.lower().split(), reference.lower().split()
    common = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 2 * common / (len(ours) + len(theirs)) if theirs else 0.0
