"""The tokenizer of a run, and the chat template that it trains with.

What is not covered: several templates in one tokenizer (the default one is used), and slow tokenizers.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, get_args

from versatune_ds.config.schema import ChatTemplate, Config
from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

BUILT_IN_TEMPLATES = tuple(name for name in get_args(ChatTemplate) if name != "tokenizer")
_BOS = "{{- bos_token or '' -}}\n"
_END_OF_TURN = re.compile(r"\{%- set end_of_turn = (.+?) -%\}")


READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Of files of a model folder that are read beside the weights."""


def refuse_pointers(source: str, suffixes: tuple[str, ...] = READ_SUFFIXES) -> None:
    """Raise ConfigError, naming them, where Git LFS has left pointers in a model folder in place of files."""
    folder = Path(source)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes] if folder.is_dir() else []
    small = (path for path in files if path.is_file() and path.stat().st_size < 1024)
    pointers = [path.name for path in small if path.read_bytes().startswith(b"version https://git-lfs")]
    if pointers:
        raise ConfigError(
            f"{folder}: {', '.join(pointers)}: a Git LFS pointer lies there, not the file; run git lfs pull "
            "in that folder"
        )


def load_tokenizer(config: Config) -> Any:
    """The fast tokenizer that `model.tokenizer` (or `model.source`) names.

    Raises:
        ConfigError: it cannot be found or loaded, or it is not a fast one (no character offsets).
    """
    from transformers import AutoTokenizer

    name = config.model.tokenizer or config.model.source
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    if looks_local and not os.path.isdir(name):
        raise ConfigError(f"model.tokenizer: {name} is not a folder; give a folder or a hub name")
    for folder in (name, config.model.source):
        refuse_pointers(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=config.model.trust_remote_code, use_fast=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"the tokenizer {name} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(
            f"the tokenizer {name} ({type(tokenizer).__name__}) is not a fast one; a tokenizer.json "
            "is needed, because masks come from character offsets"
        )
    return tokenizer


def embedding_rows(config: Config) -> int | None:
    """Token ids that the model has an embedding for; None where `model.source` has no config that tells."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    model = config.model
    try:
        architecture = AutoConfig.from_pretrained(model.source, trust_remote_code=model.trust_remote_code)
        return int(architecture.get_text_config(decoder=True).vocab_size)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, StrictDataclassError):
        return None


def require_rows(tokenizer: Any, rows: int) -> None:
    """Raise ConfigError, naming ids and rows, unless every id of the tokenizer has a row of the embedding."""
    text, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ConfigError(
            f"the tokenizer has ids up to {largest} ({text}), and the model's embedding has {rows} rows; use "
            "the model's own tokenizer, or a model with a larger embedding"
        )


def template_text(tokenizer: Any, name: str) -> str:
    """The Jinja text of a built-in template, or of the tokenizer's own one for the name `tokenizer`.

    A built-in template whose stop token is not in the vocabulary uses the tokenizer's eos token instead, and
    says so; one that begins with the text of the bos token does not write it twice.

    Raises:
        ConfigError: the name is unknown, the tokenizer has no template, or it has no eos token.
    """
    if name == "tokenizer":
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template; name one in data.chat_template: "
                + ", ".join(BUILT_IN_TEMPLATES)
            )
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several named templates, none of them the default
            raise ConfigError(f"the tokenizer's chat template cannot be used: {error}") from None
    if name not in BUILT_IN_TEMPLATES:
        raise ConfigError(unknown_name("chat template", name, ("tokenizer", *BUILT_IN_TEMPLATES)))
    text = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text("utf-8").rstrip("\n")
    match = _END_OF_TURN.search(text)
    assert match is not None, name
    if tokenizer.bos_token and f"'{tokenizer.bos_token}" in text:
        text = text.replace(_BOS, "", 1)
    stop = match.group(1).strip("'")
    if stop in added_texts(tokenizer):
        return text
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"the {name} template ends turns with the eos token, and the tokenizer has none; "
            "set eos_token in tokenizer_config.json"
        )
    if stop == "eos_token":
        return text
    warn_once(
        f"the {name} template ends turns with {stop}, which is not an added token of this tokenizer; its "
        f"eos token {tokenizer.eos_token} is used instead"
    )
    return text.replace(match.group(0), "{%- set end_of_turn = eos_token -%}")


@functools.cache
def warn_once(text: str) -> None:
    """Warn of something that concerns every sample."""
    logger.warning(text)


def set_chat_template(tokenizer: Any, name: str) -> None:
    """Give `tokenizer` the template that `data.chat_template: name` trains with, so that it is exported.

    Raises:
        ConfigError: as `template_text`.
    """
    tokenizer.chat_template = template_text(tokenizer, name)


def special_texts(tokenizer: Any) -> list[str]:
    """Texts of all special tokens, eos included; they are cut out of text before it is tokenised as words."""
    return added_texts(tokenizer, flagged_only=True)


def added_texts(tokenizer: Any, *, flagged_only: bool = False) -> list[str]:
    """`special_texts`, and those that were added without being flagged special: they are cut out, too."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special or not flagged_only}
    if tokenizer.eos_token is not None:
        texts.add(str(tokenizer.eos_token))
    return sorted(texts, key=lambda text: (-len(text), text))
