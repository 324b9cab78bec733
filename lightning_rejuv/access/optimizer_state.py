"""The optimizer's memory of weights that were edited under it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rejuv.access.layout import Layout
from lightning_rejuv.neurons import NeuronGroup

OptimizerState = Literal["keep", "momentum", "reset"]
OPTIMIZER_STATES: tuple[str, ...] = get_args(OptimizerState)


def check_optimizer_state(layout: Layout, mode: OptimizerState) -> None:
    """Refuse what a layout cannot do.

    Raises:
        ValueError: ``"reset"`` where parameters share one state (DeepSpeed).
    """
    if mode == "reset" and not layout.drops_state:
        raise ValueError(
            'Expected `optimizer_state` to be "momentum" or "keep" under DeepSpeed but got "reset": all parameters '
            "share one state there, and its step count would make the next step three times too large."
        )


@torch.no_grad()
def edit_optimizer_state(
    optimizers: Iterable[Optimizer],
    layout: Layout,
    whole: Iterable[str],
    parts: Mapping[str, Sequence[tuple[NeuronGroup, int, Tensor]]],
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
        layout: how the parameters are stored.
        whole: names of the parameters of which every element was edited.
        parts: by name of the parameter: neuron group, dimension and index of rows or columns that were edited.
        mode: what to forget.

    Returns:
        Names of edited parameters that have a state which could not be edited, since it does not have the
        parameter's shape (Adafactor's factors, 8-bit blocks).
    """
    if mode == "keep":
        return []
    left: dict[str, None] = {}
    everything = set(whole)
    edited = [name for name in layout.parameters if name in everything or name in parts]
    for wrapped in optimizers:
        # Lightning and DeepSpeed hand out wrappers around the optimizer that holds the state.
        optimizer: Optimizer = getattr(wrapped, "optimizer", wrapped)
        for name in edited:
            parameter = layout.parameters[name]
            if mode == "reset":
                optimizer.state.pop(parameter, None)
                continue
            if not _sliceable(optimizer.state.get(parameter, {}), parameter):
                left[name] = None
            for moment in layout.momenta(optimizer, name):
                if name in everything:
                    moment.values.zero_()
                for group, dim, index in parts.get(name, ()):
                    piece = moment.expert(group.expert)
                    if piece is not None:
                        local = piece.here(index, dim).to(piece.values.device)
                        piece.values.index_fill_(dim, local, 0)
    return list(left)


def _sliceable(state: Mapping[str, Any], parameter: Tensor) -> bool:
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
    return all(t.shape == parameter.shape and t.is_floating_point() for t in tensors)
