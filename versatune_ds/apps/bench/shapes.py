"""Model shapes by name, for bench and plan: the numbers of their config.json, so that nothing is downloaded.

A shape can be cut to its first n layers; embedding and head keep their true size.

What is not covered: weights (they are random) and tokenizers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from versatune_ds.engine.model.families import planned_shape
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.foundations.files import write_json_atomic

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)


def _decoder(kind: str, *sizes: int, rope_theta: float | None = None, **more: Any) -> dict[str, Any]:
    """A model of these `SIZES`, head and embedding not tied."""
    if rope_theta is not None:
        more["rope_parameters"] = {"rope_theta": rope_theta, "rope_type": "default"}
    fixed = {"model_type": kind, "max_position_embeddings": 131072, "tie_word_embeddings": False}
    return {**fixed, **dict(zip(SIZES, sizes, strict=True)), **more}


_llama = functools.partial(_decoder, "llama")
_qwen2 = functools.partial(_decoder, "qwen2", rope_theta=1e6)


SHAPES: dict[str, dict[str, Any]] = {
    # Source: config.json of the named repositories on the Hugging Face hub. max_position_embeddings is set
    # high in all of them, so that any length of pack can be measured; it adds no parameters.
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, rms_norm_eps=1e-6),  # Qwen/Qwen2.5-7B
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 152064, rms_norm_eps=1e-5),  # Qwen/Qwen2.5-14B
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064, rms_norm_eps=1e-5),  # Qwen/Qwen2.5-32B
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, rms_norm_eps=1e-6),  # Qwen/Qwen2-7B
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, rms_norm_eps=1e-5),  # meta-llama/Llama-2-7b-hf
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, rms_norm_eps=1e-5),  # meta-llama/Llama-2-13b-hf
    # meta-llama/Meta-Llama-3-8B
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, rms_norm_eps=1e-5, rope_theta=5e5),
    "13m": _llama(256, 688, 6, 4, 2, 16384),  # no model: large enough for comparisons on a CPU
    "tiny": _llama(64, 160, 4, 4, 2, 4096),  # no model: for CPUs; the vocabulary holds the shipped sample's
}


def shape_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a named shape, cut to its first layers; ConfigError: unknown name, too many layers."""
    if name not in SHAPES:
        raise ConfigError(unknown_name("shape", name, SHAPES))
    config = dict(SHAPES[name])
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise ConfigError(
                f"{name} has {config['num_hidden_layers']} layers; a slice of {layers} cannot be"
            )
        config["num_hidden_layers"] = layers
    return config


def write_model_folder(folder: Path, name: str, layers: int | None = None) -> Path:
    """Make `folder` a model without weights, for `model.weights: random`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "config.json", shape_config(name, layers))
    return folder


def find_shape(model: str) -> ModelShape:
    """The shape of a model by its name or folder.

    Args:
        model: a name of `SHAPES`, a folder with a config.json, or a hub name whose last part begins with one
            of the names (Qwen/Qwen2.5-32B-Instruct).

    Raises:
        ConfigError: neither a known name nor a folder with a usable config.json.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
        return planned_shape(config, str(folder))
    last = model.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    fitting = [name for name in SHAPES if last == name or last.startswith(f"{name}-")]
    if not fitting:
        raise ConfigError(
            f"{unknown_name('model', model, SHAPES)}; or give a folder with the model's config.json"
        )
    name = max(fitting, key=len)
    return planned_shape(shape_config(name), name)
