"""Tiny random models of many families, by model type."""

from __future__ import annotations

import torch
from torch import nn

# Every config takes those it knows; the others are dropped.
_SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 24,
    "n_ctx": 64,
    "rotary_dim": 4,
}
# What a family needs beside or instead of it.
FAMILIES: dict[str, dict] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bloom": {},
    "codegen": _GPT,
    "cohere": {},
    "cohere2": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": _GPT,
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "internlm3": {},
    "jamba": {},
    "jetmoe": {},
    "lfm2": {},
    "llama": {},
    "llama4_text": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 16},
    "minicpm3": {},
    "ministral": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"mlp_only_layers": [0], "decoder_sparse_step": 1},
    "qwen3": {},
    "qwen3_5_text": {},
    "qwen3_moe": {"mlp_only_layers": [0], "decoder_sparse_step": 1},
    "qwen3_next": {},
    "recurrent_gemma": {},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
}


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes) -> nn.Module:
    """A causal language model of a few thousand weights, all of them random."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    settings = {**{k: v for k, v in _SMALL.items() if k in known}, **FAMILIES.get(family, {}), **changes}
    config = kind(**settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.to(dtype).eval()
