"""The optimizer's memory of weights that were edited under it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rejuv.neurons import NeuronGroup

OptimizerState = Literal["keep", "momentum", "reset"]
OPTIMIZER_STATES: tuple[str, ...] = get_args(OptimizerState)

_MOMENTUM = ("exp_avg", "momentum_buffer")


@torch.no_grad()
def edit_optimizer_state(
    optimizers: Iterable[Optimizer],
    whole: Mapping[str, nn.Parameter],
    parts: Iterable[tuple[str, nn.Parameter, NeuronGroup, int, Tensor]],
    mode: OptimizerState,
) -> list[str]:
    """Let optimizers forget what they know of edited weights.

    ``"momentum"`` zeroes the running mean of the gradient (``exp_avg``, ``momentum_buffer``) of what was
    edited, rows and columns alone where only they were, and keeps the rest: the next step is a small one.
    ``"reset"`` drops the whole state of every edited parameter, so that it starts afresh. Zeroing both
    moments of some rows under Adam's old step count would make a step of (1 - β1) / sqrt(1 - β2) = 3.2
    learning rates, and is not offered. ``"keep"`` changes nothing.

    Args:
        optimizers: whose states are edited.
        whole: parameters of which every element was edited, by name.
        parts: name, parameter, neuron group, dimension and index of rows or columns that were edited.
        mode: what to forget.

    Returns:
        Names of edited parameters that have a state which could not be edited, since it does not have the
        parameter's shape (Adafactor's factors, 8-bit blocks).
    """
    if mode == "keep":
        return []
    left: dict[str, None] = {}
    pieces = list(parts)
    edited = {**whole, **{name: parameter for name, parameter, *_ in pieces}}
    for optimizer in optimizers:
        # Lightning and DeepSpeed hand out wrappers around the optimizer that holds the state.
        states: Any = getattr(optimizer, "optimizer", optimizer).state
        if mode == "reset":
            for parameter in edited.values():
                states.pop(parameter, None)
            continue
        for name, parameter in edited.items():
            if not _sliceable(states.get(parameter, {}), parameter):
                left[name] = None
        for parameter in whole.values():
            for moment in _moments(states.get(parameter, {}), parameter):
                moment.zero_()
        for _, parameter, group, dim, index in pieces:
            for moment in _moments(states.get(parameter, {}), parameter):
                group.matrix(moment).index_fill_(dim, index.to(moment.device), 0)
    return list(left)


def _moments(state: Mapping[str, Any], parameter: Tensor) -> list[Tensor]:
    found = (state.get(key) for key in _MOMENTUM)
    return [m for m in found if isinstance(m, Tensor) and m.shape == parameter.shape]


def _sliceable(state: Mapping[str, Any], parameter: Tensor) -> bool:
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
    return all(t.shape == parameter.shape and t.is_floating_point() for t in tensors)
