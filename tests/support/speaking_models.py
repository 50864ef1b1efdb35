"""Tiny models that write words with known probabilities, so that what they know is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOS, EOS = "<bos>", "<eos>"


def word_tokenizer(words: Mapping[str, float] | list[str], **names: Any) -> Any:
    """A tokenizer with one token per word; words are joined as they are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([BOS, EOS, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **({"bos_token": BOS, "eos_token": EOS} | names)
    )


def unigram_model(folder: Path, words: Mapping[str, float], *, end: float = 0.2, **names: Any) -> Path:
    """A Llama folder that writes each word, and ends, with the given probabilities, whatever came before.

    All embeddings are one vector and the layers add nothing to it, so that the output weights alone decide.

    Args:
        words: word -> probability (with `end` they sum to 1); a word should begin with a space.
        end: probability of the EOS token.
        names: of the tokenizer's special tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(words, **names)
    probabilities = {EOS: end, **words}
    assert math.isclose(sum(probabilities.values()), 1.0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words) + 3,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.fill_(-100.0 / 16)
        for word, probability in probabilities.items():
            if probability:
                token = tokenizer.convert_tokens_to_ids(word)
                model.lm_head.weight[token] = math.log(probability) / 16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
