"""Folders that `datasets` wrote or reads: which files hold which split, and the names behind class labels.

Told, in this order, from `save_to_disk` (state.json, dataset_dict.json), the `configs:` of a README.md, and
the names of folders and files, by the rules of `datasets` (`data/NAME-00000-of-00001`; train, training;
validation, valid, dev, val; test, testing, eval, evaluation). Unlike there, files whose names tell no split
beside others that do belong to train.

What is not covered: several configurations without a default one (refused), and loading scripts.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from versatune_ds.foundations.errors import DataError

METADATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json")
"""JSON files that are no data."""
_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_BY_KEYWORD = {s: re.compile(rf"(?:.*[-._ 0-9])?(?:{w})(?:[-._ 0-9].*)?") for s, w in _KEYWORDS.items()}
_BY_SHARD = re.compile(r"(?:.*/)?data/([^/]+)-\d{5}-of-\d{5}[^/]*")
_CARD = re.compile(r"\s*---\n(.*?)\n---", re.DOTALL)


@dataclass(frozen=True)
class FolderContent:
    """The data files of a folder that a source reads, as paths inside of it."""

    files: list[str]
    left_out: list[str]
    """Files that are no data: metadata, caches of `datasets`."""
    other_splits: dict[str, int] = field(default_factory=dict)
    """Splits that are not read, with the number of their files."""
    labels: dict[str, list[str]] = field(default_factory=dict)
    """Column of class labels -> the name behind each number."""


def choose_files(
    folder: str, names: Sequence[str], split: str, read: Callable[[str], bytes]
) -> FolderContent:
    """What a source that names a folder reads.

    Args:
        folder: for error texts.
        names: files below the folder that could be data, and its metadata, as sorted relative paths.
        split: the source's `split`; `a+b` stands for both.
        read: content of a file of `names`.

    Raises:
        DataError: it holds several splits and not this one, or its metadata cannot be used.
    """
    saved, known = _saved(folder, names, read)
    card = _card(folder, read) if "README.md" in names else {}
    places = {posixpath.dirname(path) for path in saved}  # there, other Arrow files are caches of `map`
    left_out = [
        name
        for name in names
        if name not in saved
        and (
            posixpath.basename(name) in METADATA
            or (name.endswith(".arrow") and posixpath.dirname(name) in places)
        )
    ]
    no_data = {*saved, *left_out, "README.md"}
    data = [*saved, *(name for name in names if name not in no_data)]
    splits = known or _configured(folder, card, data) or _by_name(data) or {"train": data}
    listed = {name for files in splits.values() for name in files}
    left_out += [name for name in data if name not in listed]
    labels = _labels(folder, names, card, read)
    wanted = list(dict.fromkeys(split.split("+")))
    if len(splits) == 1 and split == "train":  # nothing to choose from
        wanted = list(splits)
    if unknown := [name for name in wanted if name not in splits]:
        raise DataError(
            f"holds {', '.join(splits)}, and not {', '.join(unknown)}; set `split` of the source to a split "
            "that is there (a+b stands for two), or name files",
            path=folder,
        )
    chosen = dict.fromkeys(name for part in wanted for name in splits[part])
    others = {name: len(files) for name, files in splits.items() if name not in wanted}
    return FolderContent(list(chosen), left_out, others, labels)


def _saved(
    folder: str, names: Sequence[str], read: Callable[[str], bytes]
) -> tuple[dict[str, None], dict[str, list[str]]]:
    """Data files that save_to_disk listed, in order; and by split, where it wrote several."""
    saved: dict[str, None] = {}
    for name in names:
        inside = posixpath.dirname(name)
        if (
            posixpath.basename(name) != "state.json"
            or posixpath.join(inside, "dataset_info.json") not in names
        ):
            continue
        state = _json(folder, name, read)
        if state.get("_indices_data_files"):
            raise DataError(
                "was saved with an indices mapping, by an old version of datasets; write it again with "
                f"`load_from_disk({folder!r}).flatten_indices().save_to_disk(...)`",
                path=posixpath.join(folder, inside),
            )
        listed = [posixpath.join(inside, str(entry["filename"])) for entry in state.get("_data_files", [])]
        if missing := [path for path in listed if path not in names]:
            raise DataError(f"{name} lists {missing[0]}, which is not there; copy it again", path=folder)
        saved |= dict.fromkeys(listed)
    splits: dict[str, list[str]] = {}
    if "dataset_dict.json" in names:
        for split in _json(folder, "dataset_dict.json", read).get("splits", []):
            splits[split] = [name for name in saved if name.startswith(f"{split}/")]
    return saved, splits


def _by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by the split that their names tell; empty if no name tells one."""
    found = {name: _split_of(name) for name in names}
    splits: dict[str, list[str]] = {}
    if any(found.values()):
        for name, split in found.items():
            splits.setdefault(split or "train", []).append(name)
    return splits


def _split_of(name: str) -> str | None:
    if match := _BY_SHARD.fullmatch(name):
        return match[1]
    for part in name.split("/"):
        for split, pattern in _BY_KEYWORD.items():
            if pattern.fullmatch(part):
                return split
    return None


def _configured(folder: str, card: dict[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """Files by split as the `configs:` of the README say; empty if they say nothing."""
    from fsspec.utils import glob_translate

    configs = {
        str(c.get("config_name", "default")): c for c in card.get("configs") or [] if c.get("data_files")
    }
    if not configs:
        return {}
    chosen = [name for name, config in configs.items() if config.get("default") or name == "default"]
    if len(configs) > 1 and not chosen:
        raise DataError(
            f"holds the configurations {', '.join(configs)}; name the files of one, e.g. as a glob",
            path=folder,
        )
    config = configs[chosen[0] if chosen else next(iter(configs))]
    entries = config["data_files"]
    if isinstance(entries, dict):
        entries = [{"split": split, "path": path} for split, path in entries.items()]
    splits: dict[str, list[str]] = {}
    for entry in [entries] if isinstance(entries, str) else entries:
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        for path in [entry["path"]] if isinstance(entry["path"], str) else entry["path"]:
            path = posixpath.normpath(posixpath.join(config.get("data_dir") or "", path))
            pattern = re.compile(glob_translate(path))
            if found := [name for name in names if pattern.match(name)]:  # perhaps not all was downloaded
                splits.setdefault(str(entry["split"]), []).extend(found)
    return splits


def _labels(
    folder: str, names: Sequence[str], card: dict[str, Any], read: Callable[[str], bytes]
) -> dict[str, list[str]]:
    """Names of class labels, from the README and from dataset_info.json and dataset_infos.json anywhere."""
    infos = card.get("dataset_info") or []
    infos = infos if isinstance(infos, list) else [infos]
    for name in names:
        if posixpath.basename(name) in ("dataset_info.json", "dataset_infos.json"):
            info = _json(folder, name, read)
            infos += [info] if "features" in info else list(info.values())
    found: dict[str, list[str]] = {}
    for info in infos:
        found |= label_names((info or {}).get("features") if isinstance(info, dict) else None)
    return found


def label_names(features: Any) -> dict[str, list[str]]:
    """Column -> names of its class labels, from `features` as in JSON (a dict) or a README (a list)."""
    found = {}
    if isinstance(features, list):
        features = {entry.get("name"): entry.get("dtype") for entry in features if isinstance(entry, dict)}
    for column, feature in (features or {}).items():
        if not isinstance(feature, dict):
            continue
        names = feature.get("class_label", feature if feature.get("_type") == "ClassLabel" else {}).get(
            "names"
        )
        if isinstance(names, dict):
            names = [names[number] for number in sorted(names, key=int)]
        if names:
            found[column] = [str(name) for name in names]
    return found


def _card(folder: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    """The YAML at the beginning of a README.md; empty without it."""
    match = _CARD.match(read("README.md").decode("utf-8", "replace").replace("\r\n", "\n"))
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise DataError(
            f"the YAML at the beginning is not valid: {error}", path=f"{folder}/README.md"
        ) from None
    return card if isinstance(card, dict) else {}


def _json(folder: str, name: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        value = json.loads(read(name))
    except ValueError as error:
        raise DataError(f"is not valid JSON: {error}", path=posixpath.join(folder, name)) from None
    return value if isinstance(value, dict) else {}
