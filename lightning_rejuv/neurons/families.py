"""The table: for every family of decoders, which module of a layer is which projection."""

from __future__ import annotations

from typing import TypeAlias

from lightning_rejuv.neurons.fused_rows import (
    FusedRows,
    bigcode_qkv,
    falcon_qkv,
    gate_up,
    gate_up_interleaved,
    latent_key_value,
    latent_rotary_key,
    qkv,
    qkv_per_head,
)
from lightning_rejuv.neurons.group import Kind

Rules: TypeAlias = "dict[str, Kind | FusedRows]"

_ATTENTION: Rules = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"}
_ATTENTION_OUT: Rules = {**_ATTENTION, "self_attn.o_proj": "o"}
_PLAIN_MLP: Rules = {"mlp.up_proj": "up", "mlp.down_proj": "down"}
_GATED_MLP: Rules = {"mlp.gate_proj": "gate", **_PLAIN_MLP}
_NEOX_MLP: Rules = {"mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"}
_LLAMA: Rules = {**_ATTENTION_OUT, **_GATED_MLP}
_UNGATED: Rules = {**_ATTENTION_OUT, **_PLAIN_MLP}
_GLM: Rules = {**_ATTENTION_OUT, "mlp.gate_up_proj": gate_up, "mlp.down_proj": "down"}
_LATENT: Rules = {
    "self_attn.q_proj": "q",
    "self_attn.q_b_proj": "q",
    "self_attn.kv_a_proj_with_mqa": latent_rotary_key,
    "self_attn.kv_b_proj": latent_key_value,
    "self_attn.o_proj": "o",
    **_GATED_MLP,
}


def _shared(name: str) -> Rules:
    return {f"{name}.gate_proj": "gate", f"{name}.up_proj": "up", f"{name}.down_proj": "down"}


_LATENT_MOE: Rules = {**_LATENT, **_shared("mlp.shared_experts")}
_GPT2: Rules = {"attn.c_attn": qkv, "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"}

FAMILIES: dict[str, Rules] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3"),
            *("gemma", "gemma2", "gemma3_text"),
            *("smollm3", "granite", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "stablelm", "exaone4"),
            *("ernie4_5", "hunyuan_v1_dense", "helium", "seed_oss", "mixtral", "qwen3_moe", "olmoe"),
            *("granitemoe", "gpt_oss"),
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("nemotron", "apertus", "arcee"), _UNGATED),
    **dict.fromkeys(("glm", "glm4"), _GLM),
    "starcoder2": {**_ATTENTION_OUT, "mlp.c_fc": "up", "mlp.c_proj": "down"},
    "phi": {**_ATTENTION, "self_attn.dense": "o", "mlp.fc1": "up", "mlp.fc2": "down"},
    "phi3": {**_GLM, "self_attn.qkv_proj": qkv},
    "opt": {**_ATTENTION, "self_attn.out_proj": "o", "fc1": "up", "fc2": "down"},
    "gpt2": _GPT2,
    "gpt_bigcode": {**_GPT2, "attn.c_attn": bigcode_qkv},
    "gptj": {
        **{"attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v", "attn.out_proj": "o"},
        **{"mlp.fc_in": "up", "mlp.fc_out": "down"},
    },
    "gpt_neox": {"attention.query_key_value": qkv_per_head, "attention.dense": "o", **_NEOX_MLP},
    "bloom": {"self_attention.query_key_value": qkv_per_head, "self_attention.dense": "o", **_NEOX_MLP},
    "persimmon": {"self_attn.query_key_value": qkv_per_head, "self_attn.dense": "o", **_NEOX_MLP},
    "falcon": {"self_attention.query_key_value": falcon_qkv, "self_attention.dense": "o", **_NEOX_MLP},
    "mpt": {"attn.Wqkv": qkv, "attn.out_proj": "o", "ffn.up_proj": "up", "ffn.down_proj": "down"},
    "qwen2_moe": {**_LLAMA, **_shared("mlp.shared_expert")},
    "llama4_text": {**_ATTENTION_OUT, **_shared("feed_forward"), **_shared("feed_forward.shared_expert")},
    "minicpm3": _LATENT,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _LATENT_MOE),
}

# How the gate and up rows of fused experts lie, and whether their weights are stored input-first.
EXPERTS: dict[str, tuple[FusedRows, bool]] = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v2", "deepseek_v3"),
        (gate_up, False),
    ),
    "llama4_text": (gate_up, True),
    "gpt_oss": (gate_up_interleaved, True),
}

# Weights of a layer that hold no neurons: routers, and the latent halves of low-rank projections.
NO_NEURONS = (
    *("mlp.gate.weight", "mlp.router.weight", "feed_forward.router.weight", "block_sparse_moe.router.weight"),
    *("mlp.shared_expert_gate.weight", "self_attn.q_a_proj.weight"),
)
