"""Which rows of a weight that fuses several projections are neurons of which kind: index arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_rejuv.neurons.group import Kind

# From a model's configuration and the number of rows of the weight to the rows of each kind of neuron.
FusedRows: TypeAlias = Callable[[Any, int], dict[Kind, Tensor]]


def gate_up(_config: Any, rows: int) -> dict[Kind, Tensor]:
    """All gate rows, then all up rows (Phi-3, GLM, most experts)."""
    gate, up = torch.arange(rows).chunk(2)
    return {"gate": gate, "up": up}


def gate_up_interleaved(_config: Any, rows: int) -> dict[Kind, Tensor]:
    """A gate row and an up row in turn (gpt-oss)."""
    return {"gate": torch.arange(0, rows, 2), "up": torch.arange(1, rows, 2)}


def qkv(config: Any, rows: int) -> dict[Kind, Tensor]:
    """All query rows, then all key rows, then all value rows (Phi-3, GPT-2, MPT).

    Queries fill what keys and values leave, so that grouped and single key/value heads come out right.
    """
    heads = config.num_attention_heads
    if getattr(config, "multi_query", False):
        keys = rows // (heads + 2)
    else:
        shared = getattr(config, "num_key_value_heads", None) or heads
        keys = rows * shared // (heads + 2 * shared)
    query, key, value = torch.arange(rows).split([rows - 2 * keys, keys, keys])
    return {"q": query, "k": key, "v": value}


def qkv_per_head(config: Any, rows: int) -> dict[Kind, Tensor]:
    """Query, key and value rows of the first head, then of the second, … (GPT-NeoX, BLOOM, Persimmon)."""
    order = torch.arange(rows).view(config.num_attention_heads, 3, -1)
    return {"q": order[:, 0].flatten(), "k": order[:, 1].flatten(), "v": order[:, 2].flatten()}


def falcon_qkv(config: Any, rows: int) -> dict[Kind, Tensor]:
    """Falcon's three forms: one key/value head for all, groups of heads with their own, or a pair per head."""
    if config.new_decoder_architecture:
        order = torch.arange(rows).view(
            config.num_kv_heads, config.num_attention_heads // config.num_kv_heads + 2, -1
        )
        return {"q": order[:, :-2].flatten(), "k": order[:, -2].flatten(), "v": order[:, -1].flatten()}
    return qkv(config, rows) if config.multi_query else qkv_per_head(config, rows)


def bigcode_qkv(config: Any, rows: int) -> dict[Kind, Tensor]:
    """GPT-BigCode's two forms: one key/value head for all, after all queries, or query, key and value per head."""
    return qkv(config, rows) if config.multi_query else qkv_per_head(config, rows)


def latent_key_value(config: Any, rows: int) -> dict[Kind, Tensor]:
    """Per head the un-rotated key rows, then the value rows (multi-head latent attention)."""
    order = torch.arange(rows).view(-1, config.qk_nope_head_dim + config.v_head_dim)
    key, value = order.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return {"k": key.flatten(), "v": value.flatten()}


def latent_rotary_key(config: Any, rows: int) -> dict[Kind, Tensor]:
    """The last rows, the rotary key that all heads share; those before it are no neurons."""
    return {"k": torch.arange(rows - config.qk_rope_head_dim, rows)}
