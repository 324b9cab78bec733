"""The parts of a decoder: its layers, its head and its neurons."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_rejuv.adapters import adapter_of, holds_adapter, is_adapted, is_lora
from lightning_rejuv.names import listing
from lightning_rejuv.neurons.families import EXPERTS, FAMILIES, NO_NEURONS
from lightning_rejuv.neurons.fused_rows import FusedRows
from lightning_rejuv.neurons.group import WRITERS, Kind, NeuronGroup

_IN_LAYER = re.compile(r"^(?P<stack>.*?)(?:^|\.)(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<tail>.+)$")


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder-only language model.

    Attributes:
        first_layer: the decoder layer whose input is the embedding.
        branches: the modules that read the residual stream and whose output is added to it.
        head: the linear map from the normed residual stream to the logits.
        groups: its neurons, projection by projection.
    """

    first_layer: nn.Module
    branches: tuple[nn.Module, ...]
    head: nn.Module
    groups: tuple[NeuronGroup, ...]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the parts and the neurons of a causal language model.

    Args:
        model: a Hugging Face causal language model.

    Raises:
        ValueError: the neuron map does not know this family, or the model has weights in its layers
            that the map does not expect. Such a model is refused by name; its neurons are never guessed.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"The neuron reset does not know the family {family!r} of {type(model).__name__}. It knows "
            f"{', '.join(sorted(FAMILIES))}. Pass `reset=None` for fusion alone, which works on every module."
        )
    adapted = is_adapted(model)
    groups: list[NeuronGroup] = []
    layers: dict[int, str] = {}
    branches: dict[str, None] = {}
    for name, module in model.named_modules():
        found = _IN_LAYER.match(name)
        if found is None:
            continue
        layer, tail = int(found["layer"]), found["tail"]
        rule = FAMILIES[family].get(tail)
        if rule is not None and hasattr(module, "weight"):
            new = _linear_groups(name, module, rule, layer, config, adapted)
        elif tail.endswith("experts") and hasattr(module, "gate_up_proj") and family in EXPERTS:
            new = _expert_groups(name, module, *EXPERTS[family], layer, config, adapted)
        else:
            continue
        groups += new
        stack = name.removesuffix("." + tail)
        layers[layer] = stack
        branches[f"{stack}.{tail.split('.')[0]}"] = None
    if not adapted:
        _check_complete(model, family, groups)
    return Decoder(
        model.get_submodule(layers[0]),
        tuple(model.get_submodule(name) for name in branches),
        model.get_output_embeddings(),  # type: ignore[operator]
        tuple(groups),
    )


def _linear_groups(
    name: str, module: nn.Module, rule: Kind | FusedRows, layer: int, config: Any, adapted: bool
) -> list[NeuronGroup]:
    if holds_adapter(module):
        return _adapted_groups(name, module, rule, layer, config)
    if is_lora(module):  # only adapters that are not active are on it
        inside = _linear_groups(f"{name}.base_layer", module.base_layer, rule, layer, config, adapted)  # type: ignore[arg-type]
        return [replace(group, module=name) for group in inside]
    weight = module.get_parameter("weight")
    # transformers' Conv1D keeps its weight as [in, out].
    out_dim = 1 if type(module).__name__ == "Conv1D" else 0
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    parameter = f"{name}.weight"
    if rule in WRITERS:
        size = weight.shape[1 - out_dim]
        return [NeuronGroup(parameter, name, rule, layer, 1 - out_dim, size, fixed=adapted)]
    return [
        NeuronGroup(parameter, name, kind, layer, out_dim, count, index, bias, fixed=adapted)
        for kind, count, index in _kinds(rule, config, weight.shape[out_dim])
    ]


def _adapted_groups(
    name: str, module: nn.Module, rule: Kind | FusedRows, layer: int, config: Any
) -> list[NeuronGroup]:
    """Return the groups of an adapted projection: rows of the merged weight are rows of B, its columns those of A."""
    adapter = adapter_of(module)
    first, second = (module.get_submodule(f"{table}.{adapter}") for table in ("lora_A", "lora_B"))
    if rule in WRITERS:
        size = first.get_parameter("weight").shape[1]
        return [NeuronGroup(f"{name}.lora_A.{adapter}.weight", name, rule, layer, 1, size)]
    stem = f"{name}.lora_B.{adapter}"
    bias = f"{stem}.bias" if second.bias is not None else None
    return [
        NeuronGroup(f"{stem}.weight", name, kind, layer, 0, count, index, bias)
        for kind, count, index in _kinds(rule, config, len(second.get_parameter("weight")))
    ]


def _kinds(rule: Kind | FusedRows, config: Any, rows: int) -> list[tuple[Kind, int, Tensor | None]]:
    """Return the projections in a reader's weight: their kind, their number of neurons and where they lie."""
    if isinstance(rule, str):
        return [(rule, rows, None)]
    return [(kind, len(index), index) for kind, index in rule(config, rows).items()]


def _expert_groups(
    name: str,
    module: nn.Module,
    fused_rows: FusedRows,
    transposed: bool,
    layer: int,
    config: Any,
    adapted: bool,
) -> list[NeuronGroup]:
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    out_dim = int(transposed)
    stem = f"{name}.gate_up_proj"
    bias = f"{stem}_bias" if hasattr(module, "gate_up_proj_bias") else None
    groups = []
    for expert in range(len(gate_up)):
        for kind, index in fused_rows(config, gate_up.shape[1 + out_dim]).items():
            groups.append(
                NeuronGroup(stem, name, kind, layer, out_dim, len(index), index, bias, expert, fixed=adapted)
            )
        count = down.shape[2 - out_dim]
        groups.append(
            NeuronGroup(
                f"{name}.down_proj", name, "down", layer, 1 - out_dim, count, expert=expert, fixed=adapted
            )
        )
    return groups


def _check_complete(model: nn.Module, family: str, groups: list[NeuronGroup]) -> None:
    mapped = {group.parameter for group in groups}
    unknown = []
    for name, parameter in model.named_parameters():
        found = _IN_LAYER.match(name)
        if found and parameter.dim() > 1 and name not in mapped and not found["tail"].endswith(NO_NEURONS):
            if found["tail"].endswith("_bias"):
                continue
            unknown.append(name)
    if unknown or not groups:
        raise ValueError(
            f"The neuron map for {family!r} does not fit {type(model).__name__}: it does not expect "
            f"{listing(unknown)}. Pass `reset=None` for fusion alone."
        )
