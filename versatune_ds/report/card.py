"""A model card from a run folder: what was trained on what, how it was mixed, losses before and after.

Paths of this machine do not get into it: a local file stands there by its name.

What is not covered: the licence, and what the model is for; nothing here knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from versatune_ds.data.rows.files import HUB_PREFIX
from versatune_ds.report.page import Table, table_to_markdown
from versatune_ds.report.runs import RunData
from versatune_ds.report.tables import FACTS, domain_table

FACTS_OF_A_CARD = (
    *("Strategy of weights", "Tokens trained on", "… of these supervised", "Packing efficiency"),
    *("Training loss", "Held-out loss", "Weight updates", "Skipped steps"),
    *("Hardware", "Ranks", "Versions", "Commit"),
)
SECTIONS_OF_A_CARD = ("model", "domains", "weights", "batch", "optimizer", "train", "deepspeed")


def model_card(run: RunData, step: int | None, *, is_adapter: bool) -> str:
    """README.md of a repository on the hub.

    Args:
        step: that the weights are of; None: the best one that was kept, else the last one.
        is_adapter: an adapter for the base model, not a whole model.
    """
    model = run.config.get("model", {})
    source = _without_folder(str(model.get("source", "unknown")))
    head: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["versatune-ds", "sft", *([str(model["adapter"]["kind"])] if is_adapter else [])],
    }
    if _is_on_hub(str(model.get("source", ""))):
        head |= {"base_model": source, "base_model_relation": "adapter" if is_adapter else "finetune"}
    last = int(run.steps[-1]) if len(run.steps) else 0
    exported = step or run.best.get("step") or last
    facts = dict(FACTS)
    rows = [(name, [facts[name](run)]) for name in FACTS_OF_A_CARD]
    what = f"An adapter for {source}" if is_adapter else f"{source}, fine-tuned"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {run.label}",
        f"{what} with versatune_ds on {len(run.names)} domain(s); the weights after step {exported:,}. "
        f"Tables are of the whole run, up to step {last:,}; losses are in nats per supervised token, first "
        "→ last.",
        "## Domains",
        table_to_markdown(domain_table(run, "")),
        "## Data",
        table_to_markdown(Table(["Domain", "source", "for"], _sources(run.config))),
        "## Training",
        table_to_markdown(Table(["", ""], rows)),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(_settings(run.config), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _is_on_hub(source: str) -> bool:
    """Whether a model's source is `owner/name`; a folder of this machine is not."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def _without_folder(text: str) -> str:
    """Names on the hub and addresses as they are; of a path its last part."""
    if text.startswith(HUB_PREFIX) or "://" in text or _is_on_hub(text):
        return text
    return Path(text).name


def _sources(config: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for split in ("train", "eval"):
        for source in config.get("data", {}).get(split) or []:
            paths = source["path"] if isinstance(source["path"], list) else [source["path"]]
            domain = source.get("domain") or f"by {source.get('domain_column')}"
            rows.append((domain, [", ".join(map(_without_folder, paths)), split]))
    return rows


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shown(inner) for key, inner in value.items()}
        return _without_folder(value) if isinstance(value, str) and "/" in value else value

    return {name: shown(config[name]) for name in SECTIONS_OF_A_CARD if config.get(name)}
