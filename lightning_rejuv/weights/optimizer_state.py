"""The optimizer's memory of weights that were edited under it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rejuv.config import OptimizerState
from lightning_rejuv.neurons import NeuronGroup
from lightning_rejuv.weights.layout import MOMENTUM, Layout
from lightning_rejuv.weights.optimizer_weights import KAHAN, states_of, unwrapped


def check_optimizer_state(layout: Layout, mode: OptimizerState, optimizers: Iterable[Optimizer] = ()) -> None:
    """Refuse what a layout or an optimizer cannot do.

    Raises:
        ValueError: ``"reset"``, while parameters share one state (DeepSpeed) or one step count.
    """
    if mode != "reset":
        return
    expected = 'Expected `optimizer_state` to be "momentum" or "keep"'
    if not layout.drops_state:
        raise ValueError(
            f'{expected} under DeepSpeed but got "reset": all parameters share one state there, and its step count '
            "would make the next step three times too large."
        )
    for optimizer in unwrapped(optimizers):
        if _shares_its_count(optimizer):
            raise ValueError(
                f'{expected} with {type(optimizer).__name__} but got "reset": its parameters share one step count, '
                "which would make the next step many times too large."
            )


def _shares_its_count(optimizer: Optimizer) -> bool:
    """Whether the count that corrects the bias of running means is a group's, and stays when a state is dropped."""
    groups = [g for g in optimizer.param_groups if "betas" in g and ("k" in g or "step" in g)]
    prodigy = any("d0" in group for group in groups)  # has a count in each state, which it does not use
    return bool(groups) and (prodigy or not any("step" in state for state in states_of(optimizer).values()))


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
    edited, of some rows and columns if only they were, and keeps the rest: the next step is a small one.
    ``"reset"`` drops the whole state of every edited parameter, so that it starts afresh. Zeroing both
    moments of some rows under Adam's old step count would make a step of (1 - β1) / sqrt(1 - β2) = 3.2
    learning rates, and is not offered. ``"keep"`` changes nothing of it. In every mode the remainder that Kahan
    summation keeps of the old weights is zeroed. The history of L-BFGS, which spans all parameters, is dropped
    unless it is to be kept. Copies of the weights are no memory: :class:`WeightCopies`.

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
    left: dict[str, None] = {}
    everything = set(whole)
    edited = [name for name in layout.parameters if name in everything or name in parts]
    forgotten = KAHAN if mode == "keep" else MOMENTUM + KAHAN
    for optimizer in unwrapped(optimizers):
        wraps = _wraps(optimizer)
        if (
            edited
            and mode != "keep"
            and any("prev_flat_grad" in state for state in states_of(optimizer).values())
        ):
            optimizer.state.clear()
            continue
        for name in edited:
            parameter = layout.parameters[name]
            if mode == "reset" and not wraps:
                optimizer.state.pop(parameter, None)
                continue
            if mode != "keep" and not _sliceable(optimizer.state.get(parameter, {}), parameter):
                left[name] = None
            for moment in layout.momenta(optimizer, name, forgotten):
                if name in everything:
                    moment.values.zero_()
                for group, dim, index in parts.get(name, ()):
                    piece = moment.expert(group.expert)
                    if piece is not None:
                        local = piece.local(index, dim).to(piece.values.device)
                        piece.values.index_fill_(dim, local, 0)
    return list(left)


def _wraps(optimizer: Optimizer) -> bool:
    """Whether it has a state of its own beside that of an optimizer inside it, and needs it at every step."""
    others = [other for other in vars(optimizer).values() if hasattr(other, "param_groups")]
    return any(other.state is not optimizer.state for other in others)


def _sliceable(state: Mapping[str, Any], parameter: Tensor) -> bool:
    # Prodigy's flat `p0` is edited as weights are; its `s` measures a distance, which is not forgotten.
    tensors = [
        t for k, t in state.items() if isinstance(t, Tensor) and t.numel() > 1 and k not in ("p0", "s")
    ]
    return all(t.shape == parameter.shape and t.is_floating_point() for t in tensors)
