"""The quickstart's settings in a folder of a test's own, prepared, and small whole runs on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from launching import REPOSITORY

SMALL_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def sample_settings(folder: Path) -> dict[str, Any]:
    """Unpack the shipped sample into `folder`/sample.

    Returns:
        The quickstart's settings with all paths in `folder`, seed 5, ZeRO-3 and no evaluation.
    """
    from versatune_ds.apps.sample import unpack_sample

    unpack_sample(folder / "sample")
    text = (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    raw: dict[str, Any] = yaml.safe_load(text.replace("runs/", f"{folder}/"))
    raw["run"] = {"dir": str(folder / "run"), "seed": 5}
    raw["evaluation"] = {}
    raw["deepspeed"] = {"zero_optimization": {"stage": 3}}
    return raw


def prepare_run(folder: Path, raw: dict[str, Any]) -> Path:
    """Write settings to `folder`/config.yaml and the caches that they name; returns the former."""
    from versatune_ds.config.load import load_config
    from versatune_ds.data.cache.prepare import prepare

    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    prepare(load_config(config), progress=False)
    return config


def small_run(folder: Path, rows: int | None = None, **sections: dict[str, Any]) -> Path:
    """Prepare the sample and a model of 90 thousand parameters in `folder`.

    Args:
        rows: of each domain that are trained on, for runs that overfit them; None: all.

    Returns:
        Configuration file: `sample_settings` with these sections' keys.
    """
    raw = sample_settings(folder)
    architecture = folder / "sample" / "model" / "config.json"
    architecture.write_text(json.dumps({**json.loads(architecture.read_text()), **SMALL_MODEL}))
    for source in raw["data"]["train"] if rows else []:
        file = Path(source["path"])
        if file.suffix == ".json":
            file.write_text(json.dumps(json.loads(file.read_text())[:rows]))
        else:
            file.write_text("\n".join(file.read_text().splitlines()[:rows]))
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    return prepare_run(folder, raw)


def cut_back(source: Path, target: Path, step: int) -> None:
    """A copy of a run without checkpoints after `step` but with all lines of its logs, as after a crash."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model", "whole_*", "outcome_*"))
    for checkpoint in (target / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
