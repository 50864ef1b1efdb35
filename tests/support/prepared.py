"""Small tokenizers, row files and configurations for tests of data preparation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from versatune_ds.config.load import validate_config
from versatune_ds.config.schema import Config
from versatune_ds.data.cache import units

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "Name a prime number. Seven is a prime number, and so is eleven.",
    "user assistant system question answer 0 1 2 3 4 5 6 7 8 9",
]


def byte_level_tokenizer(specials: Sequence[str], **names: Any) -> Any:
    """A byte-level BPE tokenizer as in Qwen and Llama-3; `names`: eos_token, bos_token, chat_template, ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def qwen_like_tokenizer(**names: Any) -> Any:
    """Special tokens of Qwen2.5: <|im_end|> ends a turn and is the eos token."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level_tokenizer(
        specials, **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **names}
    )


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Different prompt/completion rows."""
    return [{"prompt": f"question {i}?", "completion": f"answer {i}."} for i in range(start, start + count)]


def data_config(
    folder: Path, tokenizer: Path, train: Any, *, names: Sequence[str] = ("law", "code"), **data: Any
) -> Config:
    """A configuration with its cache in `folder`; `train`: sources, or one path for the domain law."""
    pack_len = data.pop("pack_len", 512)
    initial = data.pop("initial", "uniform")
    if not isinstance(train, list):
        train = [{"path": str(train), "domain": names[0]}]
    return validate_config(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"source": str(tokenizer)},
            "data": {
                "train": train,
                "chat_template": "chatml",
                "cache_dir": str(folder / "cache"),
                "num_workers": 1,
                **data,
            },
            "domains": {"names": list(names), "initial": initial},
            "batch": {"pack_len": pack_len, "packs_per_step": 1},
            "train": {"max_steps": 1},
        },
        "test",
    )


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but locks and the memo of hashes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.name != units.HASHES_FILE
    }
