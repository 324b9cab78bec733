"""Neurons of any module: the output rows of its linear and convolutional layers."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from lightning_rejuv.adapters import adapter_of, holds_adapter, is_saved_module, is_tuner
from lightning_rejuv.neurons.group import NeuronGroup

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def output_rows(module: nn.Module, edited: Container[str] | None = None) -> tuple[NeuronGroup, ...]:
    """Find the neurons of a module that is no language model.

    A layer with a LoRA adapter has the rows of B instead of its own: a row's contribution is what the adapter adds.

    Args:
        module: any module.
        edited: names of the parameters that can be edited, all by default; the neurons of other layers are the base's
            own, and fixed.

    Returns:
        A group for every linear and convolutional layer, in the order of ``named_modules()``; a weight
        that several layers share counts once.

    Raises:
        ValueError: the module has no such layer.

    >>> [g.parameter for g in output_rows(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2)))]
    ['0.weight', '2.weight']
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups: dict[str, NeuronGroup] = {}
    inside: list[str] = []  # beginnings of the names of what belongs to a layer of PEFT's
    for name, layer in module.named_modules():
        if is_saved_module(layer):
            inside.append(f"{name}.original_module.")
        if is_tuner(layer):
            inside.append(f"{name}.lora_")
            if holds_adapter(layer) and adapter_of(layer) in layer.lora_B:
                inside.append(f"{name}.base_layer.")
                layer = layer.get_submodule(f"lora_B.{adapter_of(layer)}")
        elif f"{name}.".startswith(tuple(inside)):
            continue
        if not isinstance(layer, _LAYERS):
            continue
        parameter = names[id(layer.weight)]
        bias = None if layer.bias is None else names[id(layer.bias)]
        fixed = edited is not None and parameter not in edited
        new = NeuronGroup(parameter, name, "out", len(groups), 0, len(layer.weight), bias=bias, fixed=fixed)
        groups.setdefault(parameter, new)
    if not groups:
        raise ValueError(
            f"Expected {type(module).__name__} to have linear or convolutional layers but it has none. Pass "
            "`reset=None` for fusion alone."
        )
    return tuple(groups.values())
