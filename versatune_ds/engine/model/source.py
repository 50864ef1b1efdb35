"""What a model's folder is: its configuration, what its files hold, and the model that they make.

A model of images and text whose text part is a causal LM of its own (Gemma 3, Mistral 3) is trained as that
text model. Whether embedding and head are tied is found in the files: transformers unties two matrices that
differ, whatever the configuration says, but does not see it under ZeRO-3, where each rank compares nothing.

What is not covered: the files behind a hub name, which are there only after transformers has loaded them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from versatune_ds.config.model import Model
from versatune_ds.data.encode.tokenizer import READ_SUFFIXES, refuse_pointers
from versatune_ds.foundations.constants import ADAPTER_CONFIG_FILE
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""`model.dtype` in torch's words."""
TEXT_PART = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
"""Names of weights in a model of images and text, and in its text part alone; transformers' key_mapping."""
UNIMPORTANT = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Keys of a transformers config that change nothing here, beside ids of tokens."""
ROWS = 4096
"""Rows of two matrices that are compared at once."""


def multiplies_bf16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether this CPU has bf16 units; True where torch cannot say.

    Args:
        capabilities: `torch.cpu.get_capabilities()`; None: of this CPU.
    """
    if capabilities is None:
        capabilities = getattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})()
    return any(has for name, has in capabilities.items() if name.endswith("bf16"))


def load_architecture(settings: Model) -> Any:
    """The transformers config of the model, or of its text part, with the positions of `model.yarn`.

    Raises:
        ConfigError: no such folder or hub name, no usable config.json there, no causal LM, or another RoPE
            than `model.yarn` can stretch.
    """
    config, yarn = _architecture(settings), settings.yarn
    if yarn is not None:
        rope = getattr(config, "rope_parameters", None) or {}
        stretched = {**rope, "rope_type": "yarn", **yarn.model_dump()}
        if rope.get("rope_type") != "default" and rope != stretched:  # an export of ours has it already
            raise ConfigError(
                f"model.yarn stretches plain RoPE, and {settings.source} has {rope or 'none'}; leave it out"
            )
        config.rope_parameters = stretched
        config.max_position_embeddings = int(yarn.factor * yarn.original_max_position_embeddings)
    return config


def _architecture(settings: Model) -> Any:
    """The configuration as it lies there."""
    source = settings.source
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ConfigError(f"model.source {source} is not a folder; give a folder or a hub name")
    if (Path(source) / ADAPTER_CONFIG_FILE).is_file():
        raise ConfigError(
            f"{source} holds an adapter, and a whole model is needed: write one with versatune-ds export RUN "
            "--merge (to train on from it, name its base as model.source and it as model.adapter.start_from)"
        )
    refuse_pointers(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise ConfigError(f"model.source {source}: {error}") from error
    text = config.get_text_config(decoder=True)
    if text is config:
        return config
    known: Any = AutoModelForCausalLM._model_mapping
    if type(text) not in known:
        raise ConfigError(
            f"model.source {source} is a {config.model_type} model of more than text, whose text part "
            f"({text.model_type}) transformers cannot load alone; use a text model"
        )
    text.architectures = [known[type(text)].__name__]
    text.tie_word_embeddings = config.tie_word_embeddings
    text.quantization_config = getattr(config, "quantization_config", None)
    return text


def facts(architecture: Any) -> dict[str, str]:
    """What of a transformers config decides what the model computes: key -> value as JSON."""
    return {
        key: json.dumps(value, sort_keys=True, default=str)
        for key, value in architecture.to_dict().items()
        if not key.startswith("_") and not key.endswith("_token_id") and key not in UNIMPORTANT
    }


def count_parameters(settings: Model) -> int:
    """All parameters of a model, a tied matrix once; its weights are not read."""
    architecture = load_architecture(settings)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(architecture, trust_remote_code=settings.trust_remote_code)
    return sum(parameter.numel() for parameter in lm.parameters())


def check_files(settings: Model) -> None:
    """Refuse a model folder whose files cannot be what they are named.

    Raises:
        ConfigError: a Git LFS pointer stands for a file, weights are missing, cut off or pickled.
    """
    pretrained = settings.weights == "pretrained"
    suffixes = (*READ_SUFFIXES, ".safetensors") if pretrained else READ_SUFFIXES
    for folder in (settings.source, settings.tokenizer or settings.source):
        refuse_pointers(folder, suffixes)
    if pretrained and Path(settings.source).is_dir():
        weight_map(Path(settings.source))


def weight_map(folder: Path) -> dict[str, Path]:
    """The file of each tensor that transformers would load from `folder`, by name; all of them are opened.

    Raises:
        ConfigError: there are no safetensors, or one of the files is missing or cannot be opened.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole]
    if not whole.is_file() and index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif not whole.is_file() and any(folder.glob("*.bin")):
        code = (
            "from transformers import AutoModelForCausalLM as A; "
            f"A.from_pretrained({str(folder)!r}, use_safetensors=False, dtype='auto')"
            f".save_pretrained({str(folder)!r})"
        )
        raise ConfigError(
            f"model.source {folder} has its weights only in .bin files, pickles, which could run code; if "
            f"you trust them, write them as safetensors once: {shlex.join(['python', '-c', code])}"
        )
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"model.source {folder}: {file.name} cannot be loaded ({error}); get it again, or set "
                "model.weights: random"
            ) from error
    return found


def holds_own_head(folder: Path) -> bool:
    """Whether the weights of `folder` hold a head that is not its embedding."""
    files = weight_map(folder)
    names = [
        next((n for n in files if n.endswith(end)), "") for end in ("embed_tokens.weight", "lm_head.weight")
    ]
    if not all(names):
        return False
    with safe_open(files[names[0]], "pt") as one, safe_open(files[names[1]], "pt") as other:
        embedding, head = one.get_slice(names[0]), other.get_slice(names[1])
        rows = embedding.get_shape()[0]
        return embedding.get_shape() != head.get_shape() or not all(
            torch.equal(embedding[i : i + ROWS], head[i : i + ROWS]) for i in range(0, rows, ROWS)
        )


def four_bits(settings: Model) -> dict[str, Any]:
    """transformers' arguments that load a model in 4 bits onto this rank's GPU, for qlora; else none."""
    if settings.adapter is None or settings.adapter.kind != "qlora":
        return {}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[settings.dtype],
    )
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}


def load_lm(settings: Model, seed: int, **options: Any) -> PreTrainedModel:
    """The causal LM of transformers in `model.dtype`, pretrained or random.

    Args:
        settings: `model` section, of which source, weights, dtype and trust_remote_code matter here.
        seed: of random initialisation.
        options: further arguments of transformers, e.g. `attn_implementation`.

    Raises:
        ConfigError: it cannot be loaded, or lacks weights.
    """
    options |= {"trust_remote_code": settings.trust_remote_code, "dtype": DTYPES[settings.dtype]}
    config, folder = load_architecture(settings), Path(settings.source)
    check_files(settings)
    torch.manual_seed(seed)
    try:
        if settings.weights == "random":
            return AutoModelForCausalLM.from_config(config, **options)
        if config.tie_word_embeddings and folder.is_dir() and holds_own_head(folder):
            log.warning(
                "%s says tie_word_embeddings: true, and its files hold a head of its own: it is trained and "
                "exported as its files are, not tied",
                folder,
            )
            config.tie_word_embeddings = False
        # safetensors or nothing: a pytorch_model.bin is a pickle, which could run code
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.source,
            config=config,
            key_mapping=TEXT_PART,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"the model {settings.source} cannot be loaded (weights: {settings.weights}): {error}"
        ) from error
    lm: PreTrainedModel
    lm, info = loaded
    if unused := sorted(info["unexpected_keys"]):
        log.warning(
            "%d weights of %s have no place in %s and are left out, of the export, too: %s ...",
            len(unused),
            settings.source,
            type(lm).__name__,
            ", ".join(unused[:3]),
        )
    missing = set(info["missing_keys"])
    if lm.config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing or info["mismatched_keys"]:
        names = ", ".join(sorted(missing | {str(key) for key in info["mismatched_keys"]})[:5])
        raise ConfigError(
            f"the model {settings.source} lacks {len(missing)} of the model's weights or has them in "
            f"another shape ({names}); they would be random. Get the whole model (or, if only a head is "
            "missing that is the embedding, set tie_word_embeddings: true in its config.json), or set "
            "model.weights: random"
        )
    return lm
