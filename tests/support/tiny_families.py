"""A tiny random model of every family, with what makes it unlike Llama in reach of short samples."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from versatune_ds.config.model import Model
from versatune_ds.engine.model.attention import choose_attention

VOCAB_SIZE = 64
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.2, 1.5, 2.0],
            "long_factor": [3.0, 5.0, 8.0, 16.0]}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.5}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, dynamic rope": {"max_position_embeddings": 8,
                            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"sliding_window": 4},
    "mistral, wide heads": {"head_dim": 16, "sliding_window": None},
    "ministral": ALTERNATING,
    "ministral3": {"rope_parameters": YARN},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "smollm3, sliding": {**ALTERNATING, "use_sliding_window": True, "tie_word_embeddings": False},
    "phi3": {"sliding_window": 4},
    "phi3, longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
    "phi3, partial rotary, tied": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
    "olmo2, biases": {"attention_bias": True},
    "olmo3": ALTERNATING,
    "gemma2": {**ALTERNATING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {**ALTERNATING, "query_pre_attn_scalar": 8},
    "gemma3_text, capped": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "qwen3_moe": MOE,
    "qwen3_moe, some layers dense": {**MOE, "mlp_only_layers": [1], "decoder_sparse_step": 2},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 20},
    "mixtral": {**MOE, "num_local_experts": 8, "sliding_window": 4},
    "olmoe": MOE,
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**ALTERNATING, "logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
}  # fmt: skip
"""By family, and what is special after a comma."""


def family_config(kind: str, **more: Any) -> dict[str, Any]:
    """config.json of a kind."""
    return {**TINY, **FAMILY_CONFIGS[kind], "model_type": kind.split(",")[0], **more}


def family_model(kind: str, **more: Any) -> Any:
    """A random model of a kind, whose norms are not all ones; scores are capped where they should be."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**family_config(kind, **more))
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else "sdpa")
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return lm


def image_text_model(kind: str, **text_fields: Any) -> Any:
    """A random model of images and text: `gemma3` or `mistral3`."""
    torch.manual_seed(0)
    text = {"gemma3": "gemma3_text", "mistral3": "ministral3"}[kind]
    vision = {"model_type": {"gemma3": "siglip_vision_model", "mistral3": "pixtral"}[kind], "hidden_size": 32,
              "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model(
        kind, text_config=family_config(text, **text_fields), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=60, boi_token_index=61, eoi_token_index=62, tie_word_embeddings=kind == "gemma3",
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config).eval()


def attend_by_sample(lm: Any) -> Any:
    """Let a model attend as in a run on a CPU, unless it caps its scores."""
    if lm.config._attn_implementation == "sdpa":
        lm.set_attn_implementation(choose_attention(Model(source="unused"), "cpu").implementation)
    return lm
