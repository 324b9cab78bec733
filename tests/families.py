"""A tiny random model of every family that the neuron map knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 24,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
_DEEPSEEK = {
    **_LATENT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_WIDE = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text")  # heads whose sizes do not add up to hidden_size

# Family -> what its configuration needs beside the common sizes. The ending after "/" tells variants apart.
CONFIGS: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2"),
            *("gemma3_text", "smollm3", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "stablelm", "exaone4"),
            *("ernie4_5", "hunyuan_v1_dense", "helium", "seed_oss", "nemotron", "apertus", "arcee", "glm"),
            *("glm4", "starcoder2", "phi", "phi3", "gpt_neox", "bloom", "persimmon"),
        )
    },
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "llama4_text"), _MOE),
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "granitemoe": {**_MOE, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "llama/tied": {"tie_word_embeddings": True},
    "llama/bias": {"attention_bias": True, "mlp_bias": True},
    "cohere/untied": {"tie_word_embeddings": False, "logit_scale": 0.25},
    "gpt_neox/serial": {"use_parallel_residual": False},
    "stablelm/parallel": {"use_parallel_residual": True, "use_qkv_bias": True},
    "minicpm3": _LATENT,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "gpt_bigcode/per_head": {**_GPT2, "multi_query": False},
    "phi3/single": {"num_key_value_heads": 1},
    "mpt": {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    "falcon/per_head": {"multi_query": False, "parallel_attn": False, "new_decoder_architecture": False},
    "falcon/groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a family's tiny model in eval mode, all weights random, gains around one.

    A family that an older transformers does not have, or stores otherwise than the map says, is skipped.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    family = name.split("/")[0]
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    changes = CONFIGS[name]
    common = {} if "n_embd" in changes or family == "mpt" else dict(COMMON)
    if family == "falcon":
        common.pop("head_dim")
    if family in _WIDE:
        common["head_dim"] = 12
    config = CONFIG_MAPPING[family](**{**common, **changes})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.8 if parameter.dim() == 1 else 0.0, 0.2)
    if family == "granitemoe" and any("input_linear" in key for key, _ in model.named_parameters()):
        pytest.skip("this transformers stores granitemoe's experts otherwise")
    return model.to(dtype).eval()
