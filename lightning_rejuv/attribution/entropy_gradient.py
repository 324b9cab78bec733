"""Contributions from the gradient by the weights: to the token entropy, the default, or to a loss of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.attribution.attribution import Attribution
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.calibration.bounded import bounded, check_batches, most_read
from lightning_rejuv.forward import lent, requiring_grad
from lightning_rejuv.logits import logits_at
from lightning_rejuv.neurons import NeuronGroup

Loss = Callable[[nn.Module, Any], Tensor]


def attribute_loss(
    model: nn.Module, groups: Sequence[NeuronGroup], batches: Iterable[Any], loss: Loss
) -> Attribution:
    """Attribute a loss to every neuron by gradient × activation, for modules that are not language models.

    For a row i of a layer y = W x + b, summed over a batch, Σ ∂L/∂y_i y_i = ⟨∂L/∂W_i, W_i⟩ + ∂L/∂b_i b_i.

    Args:
        model: the module in eval mode.
        groups: its neurons.
        batches: what ``loss`` takes; of a stream without a length the first 128 are read, of others at most 4096.
        loss: from the module and a batch to a scalar.

    Returns:
        The contributions, summed over the batches.

    Raises:
        ValueError: there is no batch, or the loss is not a scalar with a gradient.
        TypeError: ``batches`` is no iterable of batches.
    """
    check_batches(batches, "calibration")
    result = Attribution()
    for batch in bounded(batches, "calibration", most_read(batches), lambda _: 1):

        def loss_of_batch(batch: Any = batch) -> Tensor:
            with lent(model):
                return loss(model, batch)

        scores = _scores(model, groups, loss_of_batch, _itself)
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
    """Attribute the token entropy: its first-order change if a neuron goes to its base, ⟨∂H/∂W_i, W_base,i - W_i⟩.

    Args:
        model: the fused model in eval mode.
        groups: its neurons.
        batches: calibration batches on the model's device.
        positions: for each batch the selected positions, whose entropies are added up.
        base_of: gives the anchor's tensor for a parameter's name.

    Returns:
        The contributions, nats, summed over the batches. They are positive if a reset raises the entropy,
        and ranked by their sign: a reset that lowers the entropy makes things worse, however much it does.
    """
    result = Attribution(ranking="signed")

    def toward_base(name: str, value: Tensor) -> Tensor:
        return base_of(name).to(value.device, value.dtype) - value

    # A batch of the caller's counts as one, in however many parts it goes through the model.
    for _, parts in groupby(zip(batches, positions, strict=True), lambda part: part[0].where):
        chosen = [(batch, at) for batch, at in parts if len(at)]
        scores = [
            _scores(model, groups, partial(_entropy, model, batch, at), toward_base) for batch, at in chosen
        ]
        if scores:
            sums = [torch.stack(of_group).sum(0) for of_group in zip(*scores, strict=True)]
            result.add([total[None] for total in sums], torch.zeros(1))
            result.positions += sum(len(at) for _, at in chosen) - 1
    return result


def _entropy(model: nn.Module, batch: Batch, chosen: Positions) -> Tensor:
    """Return the sum of the token entropies at some positions, nats."""
    logits = logits_at(model, batch.inputs, chosen.mask(batch.inputs["input_ids"]))
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    # A token that the model masks out, with a logit of -inf, adds nothing: 0 * -inf would be NaN.
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum()


Step = Callable[[str, Tensor], Tensor]


def _itself(_name: str, value: Tensor) -> Tensor:
    return value


def _scores(
    model: nn.Module, groups: Sequence[NeuronGroup], loss: Callable[[], Tensor], step: Step
) -> list[Tensor]:
    """Return ⟨gradient of the loss, step⟩ of each neuron's row or column and bias: [count] float32 or better a group.

    Each gradient is used as soon as the backward pass has it, and freed: those of two layers never exist at a time.
    """
    device = next(model.parameters()).device
    scores = [torch.zeros(group.count, device=device) for group in groups]
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        if group.fixed:
            continue  # its weight is the base's own: nothing is to be gained by a reset
        for name in dict.fromkeys(n for n in (group.parameter, group.bias) if n is not None):
            members.setdefault(name, []).append(number)
    parameters = {name: model.get_parameter(name) for name in members}

    def score(name: str, gradient: Tensor) -> Tensor:
        value = parameters[name].detach()
        exact = torch.promote_types(value.dtype, torch.float32)
        product = gradient.to(exact) * step(name, value).to(exact)
        for number in members[name]:
            scores[number] = scores[number].to(value.device) + _along_rows(groups[number], name, product)
        return gradient.new_zeros(()).expand_as(gradient)

    with requiring_grad(parameters.values()), torch.enable_grad():
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                "Expected the loss to return one number with a gradient but got "
                f"{value if not isinstance(value, Tensor) else (tuple(value.shape), value.requires_grad)}."
            )
        handles = [p.register_hook(partial(score, name)) for name, p in parameters.items()]
        try:
            torch.autograd.grad(value.sum(), list(parameters.values()), allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
    return scores


def _along_rows(group: NeuronGroup, name: str, product: Tensor) -> Tensor:
    rows = group.matrix(product)
    others = tuple(d for d in range(rows.dim()) if d != (group.dim if name == group.parameter else 0))
    return group.own(rows.sum(others) if others else rows)
