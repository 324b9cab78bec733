"""Scores from the gradient of a loss by the weights: generic losses, and the entropy's own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.attribution.hooks import requiring_grad
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.scores import Attribution
from lightning_rejuv.calibration import Batch
from lightning_rejuv.forward import forward_logits
from lightning_rejuv.neurons import NeuronGroup

Loss = Callable[[nn.Module, Any], Tensor]


def attribute_loss(
    model: nn.Module, groups: Sequence[NeuronGroup], batches: Iterable[Any], loss: Loss
) -> Attribution:
    """Gradient × activation of a loss for every neuron: for modules that are not language models.

    For a row i of a layer y = W x + b, summed over a batch, Σ ∂L/∂y_i y_i = ⟨∂L/∂W_i, W_i⟩ + ∂L/∂b_i b_i.

    Args:
        model: the module in eval mode.
        groups: its neurons.
        batches: what ``loss`` takes.
        loss: from the module and a batch to a scalar.

    Returns:
        A contribution per neuron and batch.

    Raises:
        ValueError: no batch, or a loss that is not a scalar with a gradient.
    """
    result = Attribution()
    for batch in batches:
        gradients = _gradients(model, groups, lambda batch=batch: loss(model, batch))  # type: ignore[misc]
        scores = [_along_rows(model, group, gradients, lambda _name, value: value) for group in groups]
        result.add([score[None] for score in scores], torch.zeros(1))
    if not result.positions:
        raise ValueError("Expected at least one calibration batch but the iterable is empty.")
    return result


def attribute_entropy(
    model: nn.Module,
    groups: Sequence[NeuronGroup],
    batches: list[Batch],
    positions: list[Positions],
    base_of: Callable[[str], Tensor],
) -> Attribution:
    """First-order change of the token entropy when a neuron goes to its base: ⟨∂H/∂W_i, W_base,i - W_i⟩.

    Args:
        model: the fused model in eval mode.
        groups: its neurons.
        batches: calibration batches on the model's device.
        positions: for each batch the selected positions, whose entropies are added up.
        base_of: gives the anchor's tensor for a parameter's name.

    Returns:
        A contribution per neuron and batch, nats; positive where a reset raises the entropy.
    """
    result = Attribution()
    for batch, chosen in zip(batches, positions, strict=True):
        if not len(chosen):
            continue

        def entropy(batch: Batch = batch, chosen: Positions = chosen) -> Tensor:
            logits = forward_logits(model, batch.inputs)[chosen.row, chosen.time]
            log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            return -(log_probs.exp() * log_probs).sum()

        def toward_base(name: str, value: Tensor) -> Tensor:
            return base_of(name).to(value.device, value.dtype) - value

        gradients = _gradients(model, groups, entropy)
        scores = [_along_rows(model, group, gradients, toward_base) for group in groups]
        result.add([score[None] for score in scores], torch.zeros(1))
        result.positions += len(chosen) - 1
    return result


def _gradients(
    model: nn.Module, groups: Sequence[NeuronGroup], loss: Callable[[], Tensor]
) -> dict[str, Tensor | None]:
    names = list(dict.fromkeys(name for g in groups for name in (g.parameter, g.bias) if name is not None))
    parameters = [model.get_parameter(name) for name in names]
    with requiring_grad(parameters), torch.enable_grad():
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                "Expected the loss to return one number with a gradient but got "
                f"{value if not isinstance(value, Tensor) else (tuple(value.shape), value.requires_grad)}."
            )
        found = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def _along_rows(
    model: nn.Module,
    group: NeuronGroup,
    gradients: dict[str, Tensor | None],
    step: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """⟨gradient, step⟩ of each neuron's row or column and bias, [count] float32 or better."""
    total = torch.zeros((), device=model.get_parameter(group.parameter).device)
    for name in (group.parameter, group.bias):
        gradient = None if name is None else gradients[name]
        if name is None or gradient is None:
            continue
        value = model.get_parameter(name).detach()
        exact = torch.promote_types(value.dtype, torch.float32)
        product = gradient.to(exact) * step(name, value).to(exact)
        rows = group.matrix(product)
        others = tuple(d for d in range(rows.dim()) if d != (group.dim if name == group.parameter else 0))
        total = total + group.own(rows.sum(others) if others else rows)
    return total.expand(group.count)
