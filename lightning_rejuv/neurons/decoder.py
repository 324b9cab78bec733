"""The parts of a decoder that attribution needs: its layers, its final norm, its head."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from lightning_rejuv.neurons.group import Kind, NeuronGroup

_PROJECTIONS: dict[str, Kind] = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
# Families whose residual stream is the plain sum of the embedding and of what o_proj and down_proj write.
_FAMILIES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model, taken apart.

    Attributes:
        layers: the decoder layers, first to last.
        final_norm: the norm between the last layer and the head.
        head: the linear map from the normed residual stream to the logits.
        groups: its neurons, projection by projection.
    """

    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Linear
    groups: tuple[NeuronGroup, ...]


def take_apart(model: nn.Module) -> Decoder:
    """Find the parts and the neurons of a causal language model.

    Args:
        model: a Hugging Face causal language model.

    Raises:
        ValueError: the neuron map does not know this family; it is refused by name, never guessed.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in _FAMILIES:
        raise ValueError(
            f"The neuron reset does not know the family {family!r} of {type(model).__name__}: it knows "
            f"{', '.join(_FAMILIES)}. Set `reset_fraction=0` for fusion alone, which works on every module."
        )
    inner = model.get_decoder()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return Decoder(inner.layers, inner.norm, head, tuple(_groups(model)))


def _groups(model: nn.Module) -> list[NeuronGroup]:
    groups = []
    for name, module in model.named_modules():
        found = re.search(r"(?:^|\.)layers\.(\d+)\.(\w+\.\w+)$", name)
        kind = _PROJECTIONS.get(found.group(2)) if found else None
        if found is None or kind is None or not isinstance(module, nn.Linear):
            continue
        writes = kind in ("o", "down")
        bias = None if writes or module.bias is None else f"{name}.bias"
        count = module.in_features if writes else module.out_features
        groups.append(
            NeuronGroup(f"{name}.weight", name, kind, int(found.group(1)), int(writes), count, bias)
        )
    return groups
