"""Fingerprints of models and held-out data: what a reference or an evaluation was measured with.

A model's is made of its config.json, and of the names, sizes and first and last MiB of its weight files (a
randomly initialised one has none): hashing 64 GB at every start would take minutes. The data's is made of the
hashes of the source files, so that it does not depend on tokenizer and pack length.

What is not covered: the tokenizer's (`ChatEncoder.fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from versatune_ds.config.model import Model
from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.engine.model.source import load_architecture
from versatune_ds.foundations.files import canonical_hash

EDGE_BYTES = 1 << 20
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
UNSTABLE_KEYS = ("_name_or_path", "transformers_version")
"""Keys of config.json that say nothing about the model."""


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face folder."""
    return sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern))


def model_fingerprint(settings: Model) -> str:
    """Hash of a model: of its files in a folder, of name and commit on a hub, and of its adapter.

    Raises:
        ConfigError: no such model.
    """
    if settings.adapter is not None:
        base = model_fingerprint(settings.model_copy(update={"adapter": None}))
        parts = [[factor, _files(Path(place))] for place, factor in sorted(settings.adapter.started.items())]
        return canonical_hash([base, parts, settings.adapter.model_dump(exclude={"start_from", "dropout"})])
    architecture = load_architecture(settings)
    folder = Path(settings.source)
    if not folder.is_dir():
        return canonical_hash([settings.source, getattr(architecture, "_commit_hash", None)])
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in UNSTABLE_KEYS:
        content.pop(key, None)
    return canonical_hash([content, _files(folder) if settings.weights == "pretrained" else []])


def data_fingerprint(caches: Sequence[TokenCache | None], names: Sequence[str]) -> str | None:
    """Hash of the source files of each domain's held-out data; None without any."""
    files: dict[str, Any] = {
        name: sorted(source["sha256"] for source in cache.manifest["sources"])
        for name, cache in zip(names, caches, strict=True)
        if cache is not None
    }
    return canonical_hash(files) if files else None


def _files(folder: Path) -> list[list[Any]]:
    return [[path.name, path.stat().st_size, _edges(path)] for path in weight_files(folder)]


def _edges(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()
