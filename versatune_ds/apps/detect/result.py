"""From judged texts to knowledge.json, its picture, and a table for people: step 3 of a detection.

What is not covered: the statistics themselves (`domain/knowledge.py`) and the drawing
(`report/knowledge.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from versatune_ds.apps.detect.generate import GeneratedText
from versatune_ds.apps.detect.judge import UNKNOWN
from versatune_ds.config.schema import Config
from versatune_ds.domain.knowledge import aggregate
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.provenance import describe_versions
from versatune_ds.foundations.errors import VersaTuneError
from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.text import in_columns
from versatune_ds.report.knowledge import draw_knowledge

log = get_logger(__name__)

JUDGEMENTS_FILE = "judgements.jsonl"
KNOWLEDGE_FILE = "knowledge.json"
CHART_FILE = "knowledge.png"
OF_MODEL = {"model": "source", "weights": "weights", "model_fingerprint": "fingerprint"}
"""Key of what decides the texts -> its name in knowledge.json's `model`."""
MAX_QUIET_SHARE = 0.05
"""Of blank or unparsable texts; more is a warning."""


class Judged(NamedTuple):
    """What step 2 leaves for step 3; empty on ranks other than 0."""

    lines: Mapping[int, dict[str, Any]]
    """Index -> line of judgements.jsonl."""
    about: Mapping[str, Any]
    """The judge's identity and facts."""


def aggregate_texts(
    config: Config,
    folder: Path,
    table: DomainTable,
    generation: Mapping[str, Any],
    texts: Mapping[int, GeneratedText],
    judged: Judged,
) -> None:
    """Write knowledge.json and its picture, and a table to the log; rank 0 alone calls it.

    Raises:
        VersaTuneError: the judge could place no text.
    """
    detect, longest = config.detect, config.detect.judge.max_chars
    placed = [line for _, line in sorted(judged.lines.items()) if line["probabilities"] is not None]
    num_unknown = sum(line["problem"] == UNKNOWN for line in judged.lines.values())
    num_unparsable = len(judged.lines) - len(placed) - num_unknown
    if not placed:
        example = next(iter(judged.lines.values()))["problem"]
        raise VersaTuneError(
            f"the judge could place none of {len(judged.lines)} texts (the first: {example}); "
            f"see {folder / JUDGEMENTS_FILE}. Use a judge that answers with a domain's name, then move that "
            "file away and start the same command again"
        )
    warn_when_many("unparsable judgements", num_unparsable, len(judged.lines))
    warn_when_many("unlike all that the judge has learned from", num_unknown, len(judged.lines))
    probabilities = np.array([table.vector(line["probabilities"], "judgement") for line in placed])
    rounds = np.array([line["index"] for line in placed]) // detect.sequences
    num_blank = sum(text.is_blank for text in texts.values())
    masses = [line["name_mass"] for line in judged.lines.values() if line["name_mass"] is not None]
    left_out = judged.about.get("left_out_sources")
    sources = left_out and [np.array(left_out[name], dtype=np.float64) for name in table.names]
    content = {
        **aggregate(table, probabilities, rounds, detect.rounds, detect.seed, sources),
        "texts": {
            "generated": len(texts),
            "blank": num_blank,
            "unparsable": num_unparsable,
            "unknown": num_unknown,
            "judged": len(placed),
            "cut_at_max_new_tokens": sum(not text.finished for text in texts.values()),
            "cut_for_the_judge": sum(not t.is_blank and len(t.text) > longest for t in texts.values()),
            "mean_tokens": float(np.mean([text.num_tokens for text in texts.values()])),
        },
        "model": {name: generation[key] for key, name in OF_MODEL.items()},
        "generation": {key: value for key, value in generation.items() if key not in OF_MODEL},
        "judge": {**judged.about, **({"mean_name_mass": float(np.mean(masses))} if masses else {})},
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": describe_versions(),
    }
    path = folder / KNOWLEDGE_FILE
    write_json_atomic(path, content)
    draw_knowledge([path], folder / CHART_FILE)
    log.info("%s", knowledge_table(content))


def knowledge_table(content: Mapping[str, Any]) -> str:
    judged = content.get("judged", content["domains"])
    rows = [["domain", "share", "95 % interval", "as judged", "most probable in"]]
    for name, share in content["domains"].items():
        low, high = content["interval_95"][name]
        counted = str(content["most_probable"][name])
        rows.append([name, f"{share:.1%}", f"{low:.1%} - {high:.1%}", f"{judged[name]:.1%}", counted])
    texts, agreement = content["texts"], content["agreement"]
    facts = (
        f"{texts['generated']} texts: {texts['judged']} judged, {texts['blank']} blank, "
        f"{texts['unparsable']} unparsable, {texts['unknown']} unknown; "
        f"{len(content['rounds'])} round(s) lie {agreement['mean_total_variation']:.1%} from their mean "
        "(total variation)"
    )
    return "\n".join([*in_columns(rows), facts])


def warn_when_many(what: str, count: int, total: int) -> None:
    """Log a count that takes no part, as a warning when it is a notable share."""
    if count > MAX_QUIET_SHARE * total:
        log.warning("%s: %d of %d texts", what, count, total)
    elif count:
        log.info("%s: %d of %d texts", what, count, total)
