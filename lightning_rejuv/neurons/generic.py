"""Neurons of any module: the output rows of its linear and convolutional layers."""

from __future__ import annotations

from torch import nn

from lightning_rejuv.neurons.group import NeuronGroup

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def output_rows(module: nn.Module) -> tuple[NeuronGroup, ...]:
    """Find the neurons of a module that is no language model.

    Args:
        module: any module.

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
    for name, layer in module.named_modules():
        if not isinstance(layer, _LAYERS):
            continue
        parameter = names[id(layer.weight)]
        bias = None if layer.bias is None else names[id(layer.bias)]
        new = NeuronGroup(parameter, name, "out", len(groups), 0, len(layer.weight), bias=bias)
        groups.setdefault(parameter, new)
    if not groups:
        raise ValueError(
            f"Expected {type(module).__name__} to have linear or convolutional layers but it has none. Set "
            "`reset_fraction=0` for fusion alone."
        )
    return tuple(groups.values())
