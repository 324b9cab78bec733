"""Optimizers under which an edit of the weights would not last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rejuv.names import listing
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.optimizer_weights import unwrapped


def check_optimizer_weights(optimizers: Iterable[Optimizer], layout: Layout) -> None:
    """Refuse optimizers that hold weights in a place where they cannot be edited.

    Args:
        optimizers: those of the fit.
        layout: the parameters to edit.

    Raises:
        ValueError: an optimizer steps clones of the parameters, keeps copies of them outside its state, or
            computes them from its state alone (FTRL).
    """
    optimizers = list(optimizers)
    for optimizer in unwrapped(optimizers):
        if type(optimizer).__name__.lower() == "ftrl":
            raise ValueError(
                f"Expected an optimizer that moves the weights it finds but got {type(optimizer).__name__}, which "
                "computes them from its state `z`: the next step would undo the rejuvenation. Rejuvenate the model "
                "before this fit, or train it with another optimizer."
            )
    if layout.sharded:
        return  # the layout writes the strategy's own masters
    groups = {id(p): p for o in unwrapped(optimizers) for g in o.param_groups for p in g["params"]}
    edited = {id(p) for p in layout.parameters.values()}
    others = [p for i, p in groups.items() if i not in edited]
    left_out = {n: p for n, p in layout.parameters.items() if p.requires_grad and id(p) not in groups}
    cloned = [name for name, p in left_out.items() if any(_is_copy_of(p, other) for other in others)]
    size = sum(p.numel() for p in left_out.values())
    flat = len(left_out) == len(layout.parameters) and any(2 * p.numel() > size for p in others)
    if cloned or flat:
        of = f", which holds clones of {listing(cloned)}" if cloned else ""
        raise ValueError(
            f"Expected an optimizer that steps the model's own parameters but {_kinds(optimizers)} steps others{of}: "
            "float32 masters would undo the rejuvenation. Rejuvenate the model before the optimizer is made: "
            "`lightning_rejuv.rejuvenate`."
        )
    places = _copies_outside(optimizers, layout.parameters)
    if places:
        raise ValueError(
            "Expected optimizers whose copies of the weights lie in their state but found copies of parameters in "
            f"{listing(places)}, which would undo the rejuvenation. Rejuvenate the model before the optimizer is made: "
            "`lightning_rejuv.rejuvenate`."
        )


def _copies_outside(optimizers: Iterable[Any], parameters: Mapping[str, Tensor]) -> list[str]:
    """Places of tensors that equal a parameter and lie neither in a group nor in the state of an optimizer."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters.values():
        shapes.setdefault(parameter.shape, []).append(parameter)

    def copied(value: Any, depth: int = 0) -> bool:
        if isinstance(value, Tensor):
            return any(_is_copy_of(p, value) for p in shapes.get(value.shape, ()))
        if isinstance(value, Mapping):
            value = list(value.values())
        return depth < 3 and isinstance(value, (list, tuple)) and any(copied(v, depth + 1) for v in value)

    places = [
        f"`{type(optimizer).__name__}.{name}`"
        for optimizer in unwrapped(optimizers)
        for name, value in vars(optimizer).items()
        if name not in ("state", "param_groups", "defaults") and copied(value)
    ]
    linked = [
        f"the attribute `{key}` of parameters"
        for parameter in parameters.values()
        for key, value in vars(parameter).items()
        if isinstance(value, Tensor) and _is_copy_of(parameter, value)
    ]
    return places + linked[:1]


def _is_copy_of(parameter: Tensor, other: Tensor) -> bool:
    """Whether a tensor holds a parameter's values a second time; one value all over says nothing."""
    if other is parameter or other.shape != parameter.shape or not other.is_floating_point():
        return False
    weight, held = parameter.detach(), other.detach()
    if weight.numel() < 2 or weight.is_meta or held.is_meta or weight.data_ptr() == held.data_ptr():
        return False
    return bool((weight == held.to(weight.device, weight.dtype)).all()) and bool(
        (weight != weight.flatten()[0]).any()
    )


def _kinds(optimizers: Iterable[Any]) -> str:
    return ", ".join(type(getattr(o, "optimizer", o)).__name__ for o in optimizers)
