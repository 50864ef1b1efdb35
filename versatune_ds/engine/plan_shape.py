"""The shape of a decoder from its config.json: parameter counts without building it.

With H hidden, M MLP width, d head size, n and k query and key-value heads, a layer of the Qwen2, Qwen2.5,
Qwen3 or Llama families holds attention 2 H n d + 2 H k d (plus biases), MLP 3 H M, two norms 2 H, and in
Qwen3 two norms of d. Compared with built models in the tests.

What is not covered: mixtures of experts, and families with other layers (refused).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from versatune_ds.engine.bench_shapes import SHAPES, shape_config
from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.observability.throughput import ModelShape

FAMILIES = ("llama", "qwen2", "qwen3")
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What memory and time of a decoder depend on; widths in elements."""

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    """Embedding and head are one matrix."""
    attention_biases: int
    """Elements of all biases of a layer's attention."""

    @classmethod
    def from_config(cls, config: dict[str, Any], origin: str) -> Decoder:
        """Read a config.json.

        Args:
            origin: where it comes from, for error texts.

        Raises:
            ConfigError: another family, or a number is missing.
        """
        family = str(config.get("model_type"))
        if family not in FAMILIES:
            raise ConfigError(f"{origin}: {unknown_name('model family', family, FAMILIES)}")
        missing = [key for key in REQUIRED if not isinstance(config.get(key), int)]
        if missing:
            raise ConfigError(f"{origin}: config.json lacks {', '.join(missing)}")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        # transformers' own default of Qwen3
        default_head = 128 if family == "qwen3" else config["hidden_size"] // heads
        head_size = config.get("head_dim") or default_head
        inner = (heads + 2 * kv_heads) * head_size
        biases = inner if family == "qwen2" else 0
        if family != "qwen2" and config.get("attention_bias"):
            biases = inner + config["hidden_size"]
        return cls(
            family=family,
            hidden=config["hidden_size"],
            mlp=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_biases=biases,
        )

    @property
    def query_width(self) -> int:
        """A: query heads times head size."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Key-value heads times head size."""
        return self.kv_heads * self.head_size

    @property
    def layer_vectors(self) -> int:
        """Elements of a layer's norms and biases."""
        return 2 * self.hidden + self.attention_biases + (2 * self.head_size if self.family == "qwen3" else 0)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.mlp + self.layer_vectors

    @property
    def head_parameters(self) -> int:
        """Parameters of the head (and, as many, of an embedding of its own)."""
        return self.hidden * self.vocab

    @property
    def nonembedding_parameters(self) -> int:
        """N: all parameters but embedding and head, i.e. the layers and the last norm."""
        return self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied matrix once."""
        return self.nonembedding_parameters + self.head_parameters * (1 if self.tied else 2)

    def flops_shape(self) -> ModelShape:
        """What `observability.throughput.step_flops` needs."""
        return ModelShape(
            num_parameters=self.parameters,
            num_parameters_nonembedding=self.nonembedding_parameters,
            num_layers=self.layers,
            attention_width=self.query_width,
            hidden_size=self.hidden,
            vocab_size=self.vocab,
        )


def find_decoder(model: str) -> Decoder:
    """The decoder of a named shape or of a model folder.

    Args:
        model: a name of `bench_shapes.SHAPES`, a folder with a config.json, or a hub name whose last part
            begins with one of the names (Qwen/Qwen2.5-32B-Instruct).

    Raises:
        ConfigError: neither a known name nor a folder with a usable config.json.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
        return Decoder.from_config(config, str(folder))
    name = _shape_name(model)
    if name is None:
        raise ConfigError(
            f"{unknown_name('model', model, SHAPES)}; or give a folder with the model's config.json"
        )
    return Decoder.from_config(shape_config(name), name)


def _shape_name(model: str) -> str | None:
    """Known shape that the last part of a hub name begins with."""
    last = model.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    fitting = [name for name in SHAPES if last == name or last.startswith(f"{name}-")]
    return max(fitting, key=len) if fitting else None
