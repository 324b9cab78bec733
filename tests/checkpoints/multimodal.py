"""Tiny random models whose text model is one part of several, by the name of their class's prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.families import COMMON

_TEXT = {**COMMON, "vocab_size": 48}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 24,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
}

# By the class's prefix: the configs of its parts.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "AyaVision": {"vision_config": _VISION, "text_config": _TEXT},
    "Gemma3": {
        "vision_config": {**_VISION, "vision_use_head": False},
        "text_config": _TEXT,
        "mm_tokens_per_image": 4,
    },
    "Idefics3": {"vision_config": _VISION, "text_config": {"model_type": "llama", **_TEXT}},
    "InternVL": {
        "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        "text_config": {"model_type": "qwen2", **_TEXT},
    },
    "Llava": {
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "text_config": {"model_type": "llama", **_TEXT},
        "image_token_index": 5,
    },
    "LlavaNext": {
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "text_config": {"model_type": "mistral", **_TEXT},
        "image_token_index": 5,
    },
    "LlavaOnevision": {
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "text_config": {"model_type": "qwen2", **_TEXT},
    },
    "Mistral3": {
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
        "text_config": {"model_type": "mistral", **_TEXT},
        "image_token_index": 5,
    },
    "Mllama": {
        "vision_config": {
            **_VISION,
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 96,
            "intermediate_layers_indices": [0, 1],
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
        "text_config": {**_TEXT, "cross_attention_layers": [1]},
    },
    "PaliGemma": {
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "text_config": {"model_type": "gemma", **_TEXT},
        "projection_dim": 32,
    },
    "Qwen2Audio": {"audio_config": _AUDIO, "text_config": {"model_type": "qwen2", **_TEXT}},
    "Qwen2VL": {"vision_config": _QWEN_VISION, "text_config": {**_TEXT, "rope_scaling": _ROPE}},
    "Qwen2_5_VL": {"vision_config": _QWEN_VISION, "text_config": {**_TEXT, "rope_scaling": _ROPE}},
    "Qwen3VL": {"vision_config": _QWEN_VISION, "text_config": {**_TEXT, "rope_scaling": _ROPE}},
    "Qwen3VLMoe": {
        "vision_config": _QWEN_VISION,
        "text_config": {**_TEXT, **_EXPERTS, "rope_scaling": _ROPE},
    },
    "SmolVLM": {"vision_config": _VISION, "text_config": {"model_type": "llama", **_TEXT}},
    "VipLlava": {
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_feature_layers": [-1],
        "image_token_index": 5,
    },
    "Voxtral": {
        "audio_config": {**_AUDIO, "vocab_size": 51},
        "text_config": {"model_type": "llama", **_TEXT},
        "audio_token_id": 5,
    },
}


def tiny_multimodal(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of a few tens of thousand weights, all of them random."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**MULTIMODAL[family])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.to(dtype).eval()
