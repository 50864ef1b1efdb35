"""An adapter in peft's files, and a base model with an adapter added to its weights.

The merge reads the base model's safetensors one tensor at a time and needs no model: a weight W with an
adapter becomes W + s B A (LoRA, s = alpha / rank) or m (W + s B A) / |W + s B A| row by row (DoRA, m its
trained lengths), computed in fp32; every other tensor passes, the experts of a mixture under their published
names. Of a model of images and text the text part is written, as a text model.

What is not covered: base models whose files name their weights in yet another way than the model does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from versatune_ds.config.model import Model
from versatune_ds.engine.model.adapters import MAGNITUDE, PREFIX, file_name, lora_config
from versatune_ds.engine.model.source import TEXT_PART, weight_map
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import ConfigError, StateError
from versatune_ds.foundations.files import write_json_atomic

HEAD = "lm_head.weight"


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of the model belongs to its adapter."""
    return "lora_" in name


def adapter_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Of a model's parameters those of its adapter, by their names in peft's file."""
    return ((file_name(name), tensor) for name, tensor in tensors if is_of_adapter(name))


def save_adapter_config(settings: Model, names: Iterable[str], folder: Path) -> None:
    """Write adapter_config.json; the `names` of the tensors in the adapter's file tell its modules."""
    targets = {name.split(".")[-2 - (MAGNITUDE not in name)] for name in names}
    assert settings.adapter is not None
    config = lora_config(settings.adapter, sorted(targets))
    config.base_model_name_or_path, config.inference_mode = settings.source, True
    content = {**config.to_dict(), "target_modules": sorted(config.target_modules)}  # peft keeps a set
    write_json_atomic(folder / constants.ADAPTER_CONFIG_FILE, content)


def merged_tensors(
    settings: Model, adapter: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the base model, those with an adapter merged in fp32; one in memory at a time.

    Args:
        adapter: name in peft's file -> tensor on the CPU.

    Raises:
        ConfigError: no base model in safetensors files.
        StateError: the adapter is for other weights than those files hold; after the last tensor.
    """
    assert settings.adapter is not None
    scale = settings.adapter.alpha / settings.adapter.rank
    waiting = {name.rsplit(".lora_", 1)[0] for name in adapter}
    for path, stored, name in _names(settings.source):
        with safe_open(path, "pt") as file:
            tensor, module = file.get_tensor(stored), PREFIX + name.removesuffix(".weight")
        if module in waiting:
            tensor = _merged(tensor, module, adapter, scale)
            waiting.remove(module)
        yield name, tensor
    if waiting:
        raise StateError(
            f"the files of {settings.source} hold no {min(waiting).removeprefix(PREFIX)}.weight, for which "
            "there is an adapter: they name their weights otherwise; merge with peft (merge_and_unload)"
        )


def holds_head(source: str) -> bool:
    """Whether the files of a base model hold an output weight of its own."""
    return HEAD in {name for _, _, name in _names(source)}


def _names(source: str) -> list[tuple[Path, str, str]]:
    """(file, name in it, name in the model) of a base model's tensors, or of those of its text part; it lies
    in a folder or in the hub's cache.

    Raises:
        ConfigError: there are none.
    """
    config = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)
    if config is None:
        raise ConfigError(f"the base model {source} is not here; the adapter is merged into its safetensors")
    found = []
    for stored, path in weight_map(Path(config).parent).items():
        name = stored
        for pattern, put in TEXT_PART.items():
            name = re.sub(pattern, put, name)
        found.append((path, stored, name))
    has_images = any(stored != name for _, stored, name in found)
    return [
        (path, stored, name)
        for path, stored, name in found
        if stored != name or not has_images or name == HEAD
    ]


def _merged(weight: torch.Tensor, module: str, adapter: Mapping[str, torch.Tensor], scale: float) -> Any:
    a, b = (adapter[f"{module}.lora_{part}.weight"].float() for part in "AB")
    merged = weight.float() + scale * (b @ a)
    length = adapter.get(f"{module}.{MAGNITUDE}")
    if length is None:
        return merged
    return merged * (length.float() / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
