"""Adapters: a small trained part beside a frozen model, in peft's layers and peft's files.

LoRA (arXiv 2106.09685) adds (alpha / rank) B A to a weight W; DoRA (arXiv 2402.09353) also trains the length
of every row of the sum. Layers are put into the model in place, before its head becomes a `LossHead`, so
nothing else of the model changes its name or its class.

Adapters are combined exactly, by concatenation: with A = [A1; A2] and B = [w1 s1 B1, w2 s2 B2] / s the
product B A is w1 s1 B1 A1 + w2 s2 B2 A2 over s, of rank r1 + r2 (s: alpha / rank of each).

The model with its adapter switched off is the base that `model.kl_to_base` compares with (`BaseKL`); where
all of the model is trained a frozen copy is (`BaseHead`).

What is not covered: other methods of peft, adapters on embeddings, heads, routers and experts, several
adapters in one model, and the export (`engine/checkpointing/adapter_export.py`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from versatune_ds.config.model import Adapter
from versatune_ds.data.collate import Compared
from versatune_ds.engine.model.families import LogitRule
from versatune_ds.engine.model.router import experts_of
from versatune_ds.foundations.constants import ADAPTER_CONFIG_FILE
from versatune_ds.foundations.errors import ConfigError
from versatune_kernels import LinearKL, linear_kl

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""peft's files put it before the names of the model's modules."""
NAME = "default"
"""What peft calls an adapter within the model; its files leave it out."""
MAGNITUDE = "lora_magnitude_vector"


class SavedAdapter(NamedTuple):
    scaling: float
    """alpha / rank."""
    rank: int
    kind: str
    """"lora" or "dora"."""
    tensors: dict[str, torch.Tensor]
    """Name without `PREFIX` -> tensor on the CPU."""


def require_peft() -> Any:
    """The module peft; ConfigError where it is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "model.adapter needs peft, which is not installed: pip install 'versatune-ds[adapter]'"
        )
    import peft

    return peft


def lora_config(settings: Adapter, targets: Any) -> Any:
    """peft's `LoraConfig`.

    Args:
        targets: names of modules, or "all-linear".

    Raises:
        ConfigError: peft is not installed.
    """
    return require_peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.kind == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapter(lm: PreTrainedModel, settings: Adapter, seed: int) -> None:
    """Freeze a model and put adapter layers into it, new or from a folder; all ranks do the same.

    Args:
        lm: a transformers model whose head is its own; under ZeRO-3 its weights may be partitioned.
        seed: of A, which is random; B is 0, so that the model computes what it did.

    Raises:
        ConfigError: no peft, no such layers, or an adapter that does not fit them.
    """
    config = lora_config(settings, _targets(lm, settings))
    started = combined(settings) if settings.start_from else None
    torch.manual_seed(seed)
    try:
        require_peft().inject_adapter_in_model(config, lm, NAME)
    except ValueError as error:
        raise ConfigError(f"model.adapter.targets {settings.targets}: {error}") from error
    if getattr(config, "target_parameters", None):  # peft takes these names for those of experts
        raise ConfigError(
            f"model.adapter.targets {settings.targets}: the experts and routers of {lm.config.model_type} "
            "cannot have an adapter here; leave out gate, gate_proj, up_proj, down_proj, w1, w2 and w3"
        )
    if started is not None:
        _take_over(lm, started, settings)


def _targets(lm: PreTrainedModel, settings: Adapter) -> str | list[str]:
    """What peft is told. By `all-linear` of a mixture it means routers and experts, too, which are no linear
    layers; ours is the attention's, since a name such as gate_proj means the experts', too."""
    if settings.targets != "all-linear" or not experts_of(lm.config):
        return settings.targets
    attention = (
        name for name, module in lm.base_model.named_modules() if isinstance(module, torch.nn.Linear)
    )
    return sorted({name.split(".")[-1] for name in attention if ".mlp." not in name})


def trained_targets(lm: Any) -> list[str]:
    """Kinds of modules that have an adapter: the last part of their names, sorted."""
    return sorted({name.split(".")[-1] for name, module in lm.named_modules() if hasattr(module, "lora_A")})


def file_name(name: str) -> str:
    """Name in peft's file of an adapter's parameter in a transformers model."""
    name = name.replace(f".{NAME}.weight", "" if MAGNITUDE in name else ".weight")
    return PREFIX + name


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter folder; ConfigError where there is none, or one of another method."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        extra = [key for key in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(key)]
        extra += [f"bias {config['bias']}"] if config.get("bias", "none") != "none" else []
        if config.get("peft_type") != "LORA" or extra:
            raise ConfigError(
                f"{folder} holds an adapter of kind {config.get('peft_type')} {', '.join(extra)}".rstrip()
                + "; only LoRA and DoRA with one rank and scale for all layers can be taken over"
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"{folder} is not an adapter folder ({error}); such a folder holds {ADAPTER_CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        ) from error
    return SavedAdapter(
        alpha / rank,
        rank,
        "dora" if config.get("use_dora") else "lora",
        {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
    )


def combined(settings: Adapter) -> dict[str, torch.Tensor]:
    """The adapter that `start_from` describes: name -> tensor, of rank `rank` and scale alpha / rank.

    Raises:
        ConfigError: folders that cannot be read, or do not fit the settings or each other.
    """
    factors = settings.started
    parts = {folder: read_adapter(Path(folder)) for folder in factors}
    kind = "dora" if settings.kind == "dora" else "lora"
    for folder, part in parts.items():
        if part.kind != kind:
            raise ConfigError(f"{folder} holds a {part.kind} adapter; model.adapter.kind is {settings.kind}")
    ranks = [part.rank for part in parts.values()]
    if sum(ranks) != settings.rank:
        raise ConfigError(
            f"model.adapter.start_from has adapters of rank {' + '.join(map(str, ranks))}; set "
            f"model.adapter.rank: {sum(ranks)}"
        )
    names = {name for part in parts.values() for name in part.tensors}
    unequal = sorted(name for name in names if any(name not in part.tensors for part in parts.values()))
    if unequal:
        raise ConfigError(f"the adapters of start_from have different layers: {unequal[0]} is not in all")
    if kind == "dora" and (len(parts) > 1 or list(factors.values()) != [1.0]):
        raise ConfigError(
            "dora adapters cannot be added up: their rows have lengths; start from one, factor 1"
        )
    scale = settings.alpha / settings.rank
    result = {}
    for name in sorted(names):
        tensors = [part.tensors[name] for part in parts.values()]
        if name.endswith("lora_A.weight"):
            result[name] = torch.cat(tensors)
        elif name.endswith("lora_B.weight"):
            weights = [factors[folder] * part.scaling / scale for folder, part in parts.items()]
            result[name] = torch.cat([w * t for w, t in zip(weights, tensors, strict=True)], dim=1)
        else:
            result[name] = tensors[0]
    return result


def _take_over(lm: PreTrainedModel, tensors: Mapping[str, torch.Tensor], settings: Adapter) -> None:
    """Copy values into the adapter's parameters, which nothing has partitioned yet."""
    own = {file_name(n).removeprefix(PREFIX): p for n, p in lm.named_parameters() if p.requires_grad}
    if own.keys() != tensors.keys():
        lacking, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise ConfigError(
            f"model.adapter.start_from {settings.start_from} does not fit model.adapter.targets: not in the "
            f"adapter {lacking[:2]}, not among the targets {unknown[:2]}; set targets to those of the adapter"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ConfigError(
                    f"model.adapter.start_from: {name} is {list(tensors[name].shape)}, this model needs "
                    f"{list(parameter.shape)}; was the adapter trained on another model?"
                )
            parameter.copy_(tensors[name])


# --- the base model -----------------------------------------------------------------------------------------


class ComparedTokens(NamedTuple):
    """Of one pack."""

    kl: torch.Tensor
    """float32 [n], KL(base || model) in nats."""
    samples: torch.Tensor
    """int32 [n], each one's sample in the pack."""


class BaseHead(nn.Module):
    """The output weight of a frozen base; under ZeRO-3 it exists only inside this module's forward."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, kl: Callable[[torch.Tensor, torch.Tensor], LinearKL]) -> LinearKL:
        """`kl` of the model's hidden states and this weight."""
        return kl(hidden, self.weight)


class BaseKL:
    """The KL term of packs, times `coefficient`, and the compared tokens of the last one until `take`."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self._tokens: ComparedTokens | None = None

    @contextmanager
    def base(self, lm: Any) -> Iterator[None]:
        """Within it `lm` is the base: no adapter, no dropout, nothing kept for backward."""
        layers = [module for module in lm.modules() if hasattr(module, "lora_A")]
        # peft's own switch also makes parameters frozen and trainable again: ZeRO has hooks on them
        for layer in layers:
            layer._disable_adapters = True
        lm.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            lm.train()
            for layer in layers:
                layer._disable_adapters = False

    def term(
        self,
        compared: Compared,
        sample_ids: torch.Tensor,
        base: torch.Tensor,
        head: BaseHead | None,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        rule: LogitRule,
    ) -> torch.Tensor:
        """coefficient x sum of KL(base || model) over the pack's compared tokens / normalizer, float32 [].

        Args:
            sample_ids: int32 [T], the sample of each position of the pack.
            base: [n, H], what the base made of the compared tokens.
            head: of the base; None: the model's, which is frozen.
            hidden: [T, H], what the model made of the pack.
            weight: [V, H] of the model's head.
        """

        def kl_of(states: torch.Tensor, base_weight: torch.Tensor | None) -> LinearKL:
            return linear_kl(states, base, weight, base_weight, logit_scale=rule.scale, softcap=rule.softcap)

        rows = hidden[compared.rows]
        kl = kl_of(rows, None) if head is None else head(rows, kl_of)
        self._tokens = ComparedTokens(kl.rows, sample_ids[compared.rows])
        return self.coefficient * kl.total / compared.normalizer

    def take(self) -> ComparedTokens | None:
        """The compared tokens of the last pack."""
        tokens, self._tokens = self._tokens, None
        return tokens
