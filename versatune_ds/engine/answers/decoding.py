"""Texts that a causal LM of transformers continues, by transformers' own `generate`.

Used for scored answers during training, and by `versatune-ds detect`.

Under ZeRO-3 every forward is a collective: there all ranks generate until the last of them has finished
(`in_step`), each with as many calls as the others.

What is not covered: what is asked (`questions.py`) and how texts are sampled (the caller's settings).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from versatune_ds.engine.model.attention import BY_SAMPLE, VARLEN
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.foundations.errors import ConfigError


class DecodedText(NamedTuple):
    text: str
    """Without special tokens."""
    num_tokens: int
    """Generated tokens, the end token not counted."""
    finished: bool
    """Whether the model ended it; False: it was cut."""


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both int64[n, longest]; padding stands in front and has mask 0."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def continuations(
    lm: Any,
    rows: Sequence[Sequence[int]],
    settings: GenerationConfig,
    device: torch.device,
    in_step: bool = False,
) -> list[list[int]]:
    """New ids behind each row, filled up with `pad_token_id` behind a row's end token.

    Args:
        lm: a causal LM of transformers, in eval mode.
        rows: n lists of ids, each at least one.
        settings: all of how texts are generated; a model folder's own settings count for nothing.
        device: where the model computes; under ZeRO-3 its parameters may lie elsewhere.
        in_step: every rank calls this at once, and each goes on until all have finished.
    """
    ids, mask = (tensor.to(device) for tensor in pad_left(rows))
    own = lm.generation_config
    lm.generation_config = GenerationConfig()  # generate() would fill whatever is not set from it
    try:
        out = lm.generate(ids, attention_mask=mask, generation_config=settings, synced_gpus=in_step)
    finally:
        lm.generation_config = own
    found: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return found


def cut_text(tokenizer: Any, tokens: Sequence[int], ends: Sequence[int]) -> DecodedText:
    """From generated ids: everything before the first end token, special tokens left out."""
    length = next((i for i, token in enumerate(tokens) if token in ends), None)
    kept = tokens if length is None else tokens[:length]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return DecodedText(text, len(kept), finished=length is not None)


@contextmanager
def generating(model: PackedCausalLM) -> Iterator[Any]:
    """The transformers model of a `PackedCausalLM`, fit to generate; packs again afterwards.

    Attention that wants the boundaries of packed samples is exchanged for sdpa (or eager, where the model has
    no sdpa), and compiled layers run as they are: each length of the cache would be compiled anew.

    Raises:
        ConfigError: the model cannot generate.
    """
    lm = model.lm
    if not lm.can_generate():
        raise ConfigError(f"{type(lm).__name__} has no generate(): leave out evaluation.generate")
    with ExitStack() as stack:
        packed = lm.config._attn_implementation
        if packed in (VARLEN, BY_SAMPLE):
            lm.set_attn_implementation("sdpa" if lm._supports_sdpa else "eager")
            stack.callback(lm.set_attn_implementation, packed)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield lm
