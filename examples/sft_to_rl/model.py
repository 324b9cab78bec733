"""The demo's language model: a real `LlamaForCausalLM`, small enough for one CPU core."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks.documents import BOS, PAD


@dataclass(frozen=True)
class Shape:
    """Size of a Llama; by default one of about 0.1 M parameters.

    Args:
        width: Of the residual stream.
        mlp_width: Neurons of each SwiGLU.
        layers: Decoder layers.
        heads: Attention heads.
    """

    width: int = 64
    mlp_width: int = 176
    layers: int = 2
    heads: int = 4


def build_model(
    vocabulary_size: int, seed: int, shape: Shape = Shape(), positions: int = 128
) -> LlamaForCausalLM:
    """A freshly initialised Llama with a context of `positions` tokens.

    Layer matrices start at std 1/√fan_in, those that write into the residual stream a further 1/√(2·layers)
    smaller, embedding and head at 0.02. (At 0.02 everywhere this width learns a third slower.)
    """
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that we draw again
        model = LlamaForCausalLM(config)
    draws = generator(seed, "initial weights")
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        std = 1 / math.sqrt(weight.shape[1]) if ".layers." in name else 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        torch.nn.init.normal_(weight, std=std, generator=draws)
    return model


def load_model(directory: str | os.PathLike[str]) -> LlamaForCausalLM:
    """Load a checkpoint that `save_model` wrote.

    Raises:
        FileNotFoundError: If `directory` holds no Hugging Face checkpoint.
    """
    if not (Path(directory) / "config.json").is_file():
        raise FileNotFoundError(f"Expected a Hugging Face checkpoint in {str(directory)!r} but found none.")
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    return model.train()


def save_model(model: LlamaForCausalLM, directory: str | os.PathLike[str]) -> Path:
    """Write a Hugging Face directory (``config.json`` and safetensors) and return its path."""
    model.save_pretrained(directory)
    return Path(directory)
