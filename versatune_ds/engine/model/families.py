"""Families of decoders: one row each, with all that training, plan, bench and preflight know of them.

A model of a family without a row trains like any causal LM of transformers, unless its configuration alters
its logits: that is refused, since the same field means different things (`logits_scaling` divides in Granite
and multiplies in HyperCLOVA X). A new family is one row here and one in `tests/support/tiny_families.py`.

What is not covered: layers of other shapes: families whose row is not `planned` have no memory plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from versatune_ds.engine.model.shape import Experts, ModelShape
from versatune_ds.foundations.errors import ConfigError, unknown_name


class Family(NamedTuple):
    """How a family differs from Llama. Names are fields of its transformers configuration."""

    planned: bool = True
    """Its layers are as `shape.py` counts them; compared with built models in the tests."""
    qkv_biases: bool = False
    """q, k and v have biases, and the output has none, whatever `attention_bias` says."""
    head_norms: bool = False
    """Norms of every head of q and k."""
    wide_norms: bool = False
    """Norms of all of q and of all of k."""
    norms: int = 2
    """Norms of the hidden states in a layer."""
    fp32_norms: bool = False
    """Norms are scaled in fp32, for which their input is kept."""
    joined: bool = False
    """q, k and v are one matrix, gate and up another."""
    softcap: str | None = None
    """Logits become c tanh(logits / c), c the value of this field."""
    logit_factor: str | None = None
    """Logits are multiplied by the value of this field."""
    logit_divisor: str | None = None
    """Logits are divided by the value of this field."""
    experts: str | None = None
    """Its layers are mixtures of as many experts as this field says."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),  # SmolLM and SmolLM 2, too
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "smollm3": Family(),
    "phi3": Family(joined=True),  # Phi 3, 3.5 and 4
    "qwen2": Family(qkv_biases=True),  # Qwen2 and Qwen2.5
    "qwen3": Family(head_norms=True),
    "olmo2": Family(wide_norms=True),
    "olmo3": Family(wide_norms=True),
    "gemma2": Family(norms=4, fp32_norms=True, softcap="final_logit_softcapping"),
    "gemma3_text": Family(norms=4, fp32_norms=True, head_norms=True, softcap="final_logit_softcapping"),
    "qwen3_moe": Family(head_norms=True, experts="num_experts"),
    "qwen2_moe": Family(planned=False, qkv_biases=True, experts="num_experts"),
    "mixtral": Family(planned=False, experts="num_local_experts"),
    "olmoe": Family(planned=False, wide_norms=True, experts="num_experts"),
    "cohere": Family(planned=False, logit_factor="logit_scale"),
    "cohere2": Family(planned=False, logit_factor="logit_scale"),
    "granite": Family(planned=False, logit_divisor="logits_scaling"),
}
MIXTURES = tuple(name for name, family in FAMILIES.items() if family.experts)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""How families call the number of a layer's experts."""
PLANNED = tuple(name for name, family in FAMILIES.items() if family.planned)

LOGIT_FIELDS = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
"""Fields that change logits in some family, with the value that changes nothing."""
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def planned_shape(config: Mapping[str, Any], origin: str) -> ModelShape:
    """The shape of a model from its config.json; of a model of images and text, that of its text part.

    Raises:
        ConfigError: a family without a plan, or a number is missing or cannot be.
    """
    values = dict(config.get("text_config") or config)
    name = str(values.pop("model_type", None))
    if name not in PLANNED:
        raise ConfigError(f"{origin}: {unknown_name('model family', name, PLANNED)}")
    missing = [key for key in REQUIRED if not isinstance(values.get(key), int)]
    if missing:
        raise ConfigError(f"{origin}: config.json lacks {', '.join(missing)}")
    try:
        return _shape(AutoConfig.for_model(name, **values))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"{origin}: {error}") from error


def built_shape(
    config: Any, counted: tuple[int, int] | None = None, trained: int | None = None
) -> ModelShape:
    """The shape of a model of any family; of one without a plan only what its FLOPs need is right.

    Args:
        counted: parameters of the built model: all, a tied embedding and head once; all but these two. None:
            by formula.
        trained: those of an adapter beside it, in neither of the two; None: the model itself is trained.
    """
    return dataclasses.replace(_shape(config, counted), trained=trained)


def _experts(config: Any, family: Family) -> Experts | None:
    """The experts of a mixture. Which layers have them is said as Qwen does; the other families: all."""
    if family.experts is None:
        return None
    dense, step = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
    layers = [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]
    return Experts(
        count=getattr(config, family.experts),
        active=config.num_experts_per_tok,
        mlp=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        layers=len(layers),
    )


def _shape(config: Any, counted: tuple[int, int] | None = None) -> ModelShape:
    family = FAMILIES.get(config.model_type, Family())

    def given(name: str, default: Any = None) -> Any:
        return getattr(config, name, None) or default

    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = given("num_key_value_heads", heads)
    head_size = given("head_dim", hidden // heads)
    mlp = given("intermediate_size", 0)
    query, key = heads * head_size, kv_heads * head_size
    vectors = [hidden] * family.norms
    if family.qkv_biases:
        vectors += (query, key, key)
    elif given("attention_bias"):
        vectors += (query, key, key, hidden)
    if given("mlp_bias"):
        vectors += (mlp, mlp, hidden)
    if family.head_norms:
        vectors += (head_size, head_size)
    if family.wide_norms:
        vectors += (query, key)
    return ModelShape(
        family=config.model_type,
        hidden=hidden,
        mlp=mlp,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab=config.vocab_size,
        tied=bool(given("tie_word_embeddings")),
        vectors=tuple(vectors),
        experts=_experts(config, family),
        norms=family.norms,
        fp32_norms=family.fp32_norms,
        query_key_norms=family.head_norms or family.wide_norms,
        joined=family.joined,
        counted=counted,
    )


class LogitRule(NamedTuple):
    """What a model does to hidden @ weight.T: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float = 0.0
    """0: none."""


def logit_rule(config: Any) -> LogitRule:
    """How a model changes its logits; ConfigError for a way that its family has no row for."""
    family = FAMILIES.get(config.model_type, Family())
    known = (family.softcap, family.logit_factor, family.logit_divisor)
    for key, neutral in LOGIT_FIELDS.items():
        if key not in known and getattr(config, key, None) not in (None, neutral):
            raise ConfigError(
                f"{config.model_type} models change their logits ({key}: {getattr(config, key)}), which the "
                "fused loss would leave out; use a Qwen or Llama model"
            )

    def value(key: str | None, neutral: float) -> float:
        given = None if key is None else getattr(config, key, None)
        return neutral if given is None else float(given)

    scale = value(family.logit_factor, 1.0) / value(family.logit_divisor, 1.0)
    return LogitRule(scale, value(family.softcap, 0.0))
