"""Random models of real shapes, for benchmarks that run `rejuvenate`."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Batch = dict[str, Tensor]


class Shape(NamedTuple):
    """The sizes of a Llama.

    Args:
        hidden: Width of the residual stream.
        intermediate: Neurons of an MLP.
        layers: How many.
        vocabulary: Tokens.
        heads: Of queries.
        key_values: Heads of keys and values.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    key_values: int


LLAMA_3_8B = Shape(4096, 14336, 32, 128256, 32, 8)


def llama(shape: Shape, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a random model in eval mode, always the same, made on the device."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_values,
        dtype=dtype,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def moved(base: LlamaForCausalLM, noise: float, sharper: float) -> LlamaForCausalLM:
    """Return a copy of a base that has drifted and grown more confident.

    Args:
        base: The model.
        noise: Standard deviation of what is added to every weight.
        sharper: What the output embedding, and with it every logit, is multiplied by.
    """
    sft = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in sft.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        sft.lm_head.weight.mul_(sharper)
    return sft


def prompts(base: LlamaForCausalLM, rows: int, length: int) -> Tensor:
    """Return random tokens."""
    return torch.randint(3, base.config.vocab_size, (rows, length), device=base.device)


def responses(model: LlamaForCausalLM, asked: Tensor, length: int, sampled: bool = False) -> Batch:
    """Return prompts with responses of so many tokens: the model's most likely ones, or sampled."""
    ids = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=sampled,
        top_k=0,
        pad_token_id=0,
    )
    labels = ids.clone()
    labels[:, : asked.shape[1]] = -100
    return {"input_ids": ids, "labels": labels}


def demonstrations(base: LlamaForCausalLM, rows: int, length: int) -> Batch:
    """Return random tokens whose second halves are responses of the base's most likely next tokens."""
    return responses(base, prompts(base, rows, length // 2), length - length // 2)
