"""Small whole runs on the shipped sample, for tests that start several of them."""

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


def small_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Prepare the sample and a model of 90 thousand parameters in `folder`.

    Returns:
        The configuration of quickstart with these sections' keys.
    """
    from versatune_ds.config.load import load_config
    from versatune_ds.data.prepare import prepare
    from versatune_ds.data.sample import unpack_sample

    sample = folder / "sample"
    unpack_sample(sample)
    architecture = sample / "model" / "config.json"
    architecture.write_text(json.dumps({**json.loads(architecture.read_text()), **SMALL_MODEL}))
    raw = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    for split in ("train", "eval"):
        for source in raw["data"][split]:
            source["path"] = source["path"].replace("runs/sample", str(sample))
    raw["run"] = {"dir": "unused", "seed": 5}
    raw["model"]["source"] = str(sample / "model")
    raw["data"]["cache_dir"] = str(folder / "cache")
    raw["evaluation"] = {}
    raw["deepspeed"] = {"zero_optimization": {"stage": 3}}
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    prepare(load_config(config), progress=False)
    return config


def cut_back(source: Path, target: Path, step: int) -> None:
    """A copy of a run without checkpoints after `step` but with all lines of its logs, as after a crash."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model", "whole_*", "outcome_*"))
    for checkpoint in (target / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
