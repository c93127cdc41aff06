"""Tiny random models of every family: what this machine is examined with, and what the tests try."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from secateur.hf import own_randomness
from secateur.model.handle import Model

VOCABULARY = 97
HIDDEN = 32
BLOCKS = 4
WINDOW = 6  # of the families with sliding attention; shorter than the sequences that are tried

# What differs from one family to the next, so that a number taken from the wrong place shows.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,  # nothing ends a generation by chance
    "pad_token_id": None,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True,
              "mlp_bias": True},
    "mistral": {"intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                "sliding_window": WINDOW},
    "qwen2": {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48,
              "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0,
              "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3": {"intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
              "tie_word_embeddings": True},
    "phi3": {"intermediate_size": 52, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": None},
    "opt": {"ffn_dim": 60, "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN, "dropout": 0.0,
            "tie_word_embeddings": True, "pad_token_id": 1},  # its positions need a padding index
    "smollm3": {"intermediate_size": 36, "num_attention_heads": 8, "num_key_value_heads": 2,
                "no_rope_layers": [1, 0, 1, 1], "use_sliding_window": True, "sliding_window": WINDOW},
    "granite": {"intermediate_size": 42, "num_attention_heads": 4, "num_key_value_heads": 2, "residual_multiplier": 0.7,
                "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "logits_scaling": 1.5},
    "gemma2": {"intermediate_size": 46, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
               "query_pre_attn_scalar": 12, "sliding_window": WINDOW, "attn_logit_softcapping": None,
               "final_logit_softcapping": 4.0, "tie_word_embeddings": True},
    "gemma3_text": {"intermediate_size": 62, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                    "query_pre_attn_scalar": 12, "sliding_window": WINDOW, "tie_word_embeddings": True,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "olmo2": {"intermediate_size": 50, "num_attention_heads": 8, "num_key_value_heads": 4},
    "phi": {"intermediate_size": 54, "num_attention_heads": 4, "num_key_value_heads": 4, "qk_layernorm": True},
    "gpt_neox": {"intermediate_size": 58, "num_attention_heads": 4},
    "gpt2": {"num_attention_heads": 4, "tie_word_embeddings": True},  # no width: it has four times the hidden size
}  # fmt: skip


TINY = tuple(_CONFIGS)  # families that there are tiny models of: those of our own table


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A stock configuration of four small blocks; `overrides` win."""
    return CONFIG_MAPPING[family](**{**_COMMON, **_CONFIGS[family], **overrides})


def tiny_hf(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random stock model in float32. Biases and norm weights are random too, so that forgetting one shows."""
    with own_randomness(seed):
        hf: Any = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
        with torch.no_grad():
            for parameter in hf.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    hf.generation_config.eos_token_id = None
    hf.generation_config.pad_token_id = None
    return hf.eval()


def tiny(family: str, seed: int = 0, **overrides: Any) -> Model:
    """`tiny_hf` as secateur sees it."""
    return Model(tiny_hf(family, seed, **overrides), source={"name": f"tiny-{family}"})
