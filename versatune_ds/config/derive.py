"""Settings of other runs that follow from a run's settings.

`versatune-ds reference` trains a model on each domain alone with the run's own trainer: the run's settings,
with the model, data share, length and evaluation of the `reference` section.

What is not covered: running them (`apps/reference.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from versatune_ds.config.load import validate_config
from versatune_ds.config.model import Adapter
from versatune_ds.config.schema import Config
from versatune_ds.foundations.constants import ADAPTER_CONFIG_FILE
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.json_input import read_object

LARGE_MODEL = 10**9
"""Parameters above which a reference is trained as an adapter unless told otherwise."""
ADAPTER_RATE = 10.0
"""Learning rate of an adapter over that of the whole model (docs/adapters.md has the source)."""


def with_model(config: Config, source: str) -> Config:
    """The run with another, finished model (or adapter folder) in its place, to be evaluated; the tokenizer
    stays, the optimizer does not."""
    raw = config.model_dump(mode="json") | {"optimizer": {}}
    raw["model"] |= {
        **model_of(source),
        "weights": "pretrained",
        "kl_to_base": None,
        "tokenizer": config.model.tokenizer or config.model.source,
    }
    return validate_config(raw, f"settings with the model {source}").like(config)


def model_of(source: str) -> dict[str, Any]:
    """Source and adapter of a `model` section for a finished model, or for an adapter and its base model.

    Raises:
        DataError: the adapter's configuration is damaged.
    """
    file = Path(source) / ADAPTER_CONFIG_FILE
    if not file.is_file():
        return {"source": source, "adapter": None}
    saved = read_object(file, "the model")
    keys = {"r": int, "lora_alpha": int | float, "target_modules": list, "base_model_name_or_path": str}
    for key, kind in keys.items():
        if not isinstance(saved.get(key), kind):
            problem = f"{key} is {saved.get(key)!r}; was this adapter written by peft or by this program?"
            raise DataError(problem, path=file)
    adapter = {
        "kind": "dora" if saved.get("use_dora") else "lora",
        "rank": saved["r"],
        "alpha": saved["lora_alpha"],
        "targets": sorted(saved["target_modules"]),
        "start_from": source,
    }
    return {"source": saved["base_model_name_or_path"], "adapter": adapter}


def proxy_config(config: Config) -> Config:
    """The run with `reference.model` in place of its model, if that is set."""
    if config.reference.model is None:
        return config
    return config.model_copy(update={"model": config.reference.model})


def reference_adapter(config: Config, num_parameters: int) -> Adapter | None:
    """The adapter that reference runs train, or None for all of a model of so many parameters."""
    chosen, model = config.reference.adapter, proxy_config(config).model
    if isinstance(chosen, Adapter) or chosen == "off":
        return None if isinstance(chosen, str) else chosen
    is_large = num_parameters > LARGE_MODEL and model.weights == "pretrained"
    return model.adapter or (Adapter() if is_large else None)


def fix_shares(raw: dict[str, Any], shares: Mapping[str, float]) -> None:
    """Make these the domain weights of a run from its first step to its last, without limits."""
    limits = {"min_weight": 0.0, "max_weight": 1.0, "max_relative_change": None, "max_epochs": None}
    raw["domains"] |= {"initial": dict(shares), **limits}
    raw["weights"] = {"strategy": "constant"}


def single_domain_config(
    config: Config, domain: str, folder: Path, num_tokens: int, adapter: Adapter | None = None
) -> Config:
    """Settings that train `reference.model` on one domain until its held-out loss stops falling.

    Args:
        domain: the one to train on; the others stay in the table with weight 0.
        num_tokens: training tokens of the domain.
        adapter: what is trained of the model, by AdamW; None: all of it.
    """
    raw = proxy_config(config).model_dump(mode="json")
    settings = config.reference
    packs_per_step = settings.packs_per_step or config.batch.packs_per_step
    steps_per_epoch = num_tokens / (packs_per_step * config.batch.pack_len)
    raw["run"] |= {"dir": str(folder), "resume": "auto"}
    fix_shares(raw, {name: float(name == domain) for name in config.domains.names})
    raw["batch"]["packs_per_step"] = packs_per_step
    change = (adapter is not None) - (config.model.adapter is not None)
    raw["optimizer"] |= {
        "lr": settings.lr or config.optimizer.lr * ADAPTER_RATE**change,
        "ema_decay": None,  # nothing is exported
        **({"kind": "adamw", "muon_lr": None} if adapter is not None else {}),
    }
    # a reference is to fit its domain as well as it can
    raw["model"] |= {"adapter": adapter and adapter.model_dump(mode="json"), "kl_to_base": None}
    steps = math.ceil(settings.max_epochs * steps_per_epoch)
    raw["train"] |= {"max_steps": steps, "epochs": None, "profile": None}
    raw["evaluation"] |= {
        "every_n_steps": max(1, round(steps_per_epoch / settings.evaluations_per_epoch)),
        "domains": [domain],
        "patience": settings.patience,
        "select": None,
        "generate": None,
    }
    raw["checkpoint"] |= {"keep_last": 1, "milestone_every_n_steps": None, "export_at_end": False}
    return validate_config(raw, f"settings of the reference run of {domain}").like(config)
