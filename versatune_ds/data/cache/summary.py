"""What a preparation found, as text: samples, tokens and rejections per split and domain, and notes.

What is not covered: the numbers themselves, which stand in unit.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from versatune_ds.data.cache.units import REJECTED_FILE
from versatune_ds.foundations.text import in_columns

_NOTES = {
    "truncated": "truncated to batch.pack_len",
    "split": "split into pieces of batch.pack_len",
    "pieces_dropped": "pieces without supervised tokens dropped",
    "special_text": "with the text of a special token in a message",
    "rewritten": "with a message that the chat template changed",
    "json_text": "with messages as JSON text",
    "untrained": "with assistant turns that are context only, by flags or data.train_on",
    "weighted": "with weights other than 0 and 1",
    "flags_elsewhere": "with weights on turns that are not the assistant's, which have no effect",
    "unread_variables": "with chat_template_kwargs that the chat template does not read",
}


@dataclass(frozen=True)
class UnitReport:
    """A prepared unit: its manifest (unit.json) and whether it had to be made."""

    split: str
    folder: Path
    manifest: dict[str, Any]
    reused: bool
    ignored: tuple[str, ...]
    """What lies beside the sources' files and is not read (`FoundFiles`), as the next one."""
    other_splits: tuple[str, ...]


def summary_lines(reports: Sequence[UnitReport]) -> Iterator[str]:
    """A table of all units, a table of their rejected rows, and notes on what a user should look at."""
    rows = [["split", "domain", "samples", "tokens", "supervised", "rejected", "repeated", "conflicting", ""]]
    rejected: list[list[str]] = []
    notes: list[str] = []
    for report in reports:
        unit = report.manifest
        for domain in [*unit["domains"], *(d for d in unit["rejected"] if d not in unit["domains"])]:
            counts = unit["domains"].get(domain)
            reasons = unit["rejected"].get(domain, {})
            bad = sum(reasons.values())
            rejected += [[report.split, domain, reason, f"{n:,}"] for reason, n in reasons.items()]
            if counts is None:
                rows.append([report.split, domain, "0", "0", "", f"{bad:,}", "", "", ""])
                continue
            share = counts["supervised_tokens"] / max(1, counts["tokens"])
            rows.append(
                [report.split, domain, f"{counts['samples']:,}", f"{counts['tokens']:,}", f"{share:.1%}",
                 f"{bad:,}", f"{counts['duplicates']:,}", f"{counts['conflicting']:,}",
                 "reused" if report.reused else ""]
            )  # fmt: skip
            for name, text in _NOTES.items():
                if count := counts["notes"].get(name):
                    notes.append(f"note: {report.split} {domain}: {count:,} {text}")
        if report.ignored:
            shown = ", ".join(report.ignored[:3]) + (", ..." if len(report.ignored) > 3 else "")
            notes.append(
                f"note: {report.split}: {len(report.ignored)} beside the data not read (other kinds of file, "
                f"metadata, names that begin with . or _): {shown}"
            )
        notes += [f"note: {report.split}: splits not read in {text}" for text in report.other_splits]
        if unused := unit.get("unused_columns"):
            about = f"{report.split} {', '.join(unit['domains'])}"
            notes.append(f"note: {about}: columns not used: {', '.join(unused)}")
        if unit["rejected"]:
            notes.append(f"rejected rows of {report.split}: {report.folder / REJECTED_FILE}")
    yield from in_columns(rows)
    if rejected:
        yield ""
        yield from in_columns([["split", "domain", "reason", "rows"], *rejected])
    if notes:
        yield ""
        yield from notes
