"""How much each neuron contributes to a target logit, at selected positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.calibration import Batch
from lightning_rejuv.forward import forward_logits
from lightning_rejuv.neurons import Decoder


@dataclass
class Attribution:
    """Contributions of every neuron to the target logits, over the positions seen so far.

    Attributes:
        total: for each neuron group [count] float64, the sum over positions of the contribution, logits.
        absolute: the same of its absolute value.
        positions: how many positions were seen.
        error: largest |reconstructed - actual| logit over the positions, divided by max(1, |actual|).
    """

    total: list[Tensor] = field(default_factory=list)
    absolute: list[Tensor] = field(default_factory=list)
    positions: int = 0
    error: float = 0.0

    def add(self, contributions: list[Tensor], error: Tensor) -> None:
        """Add contributions [P, count] of some positions, and their reconstruction errors [P]."""
        if not self.total:
            self.total = [torch.zeros_like(c[0], dtype=torch.float64) for c in contributions]
            self.absolute = [torch.zeros_like(c[0], dtype=torch.float64) for c in contributions]
        for total, absolute, c in zip(self.total, self.absolute, contributions, strict=True):
            total += c.sum(0, dtype=torch.float64)
            absolute += c.abs().sum(0, dtype=torch.float64)
        self.positions += len(error)
        self.error = max(self.error, float(error.max()))


def attribute(
    model: nn.Module, decoder: Decoder, batches: list[Batch], positions: list[Positions]
) -> Attribution:
    """Attribute the logit of the target token to the neurons, at the selected positions.

    With the final norm's scale s frozen, the logit is linear in the residual stream r, z = u·r with
    u = (W_U[v] ⊙ γ) / s, and r is the sum of the embedding and of what every layer writes. The
    contribution of input column j of a residual writer W with input a is therefore exact,
    ``a[j] * (u @ W[:, j])``. For the rows of the readers it is gradient × activation, summed over the
    sequence (before the rotary embedding for queries and keys). Liu et al. 2026, arXiv 2606.09932, §3.

    Args:
        model: the model in eval mode; its parameters receive no gradient.
        decoder: its parts.
        batches: calibration batches on the model's device.
        positions: for each batch the selected positions.

    Returns:
        The contributions, and how well they reconstruct the logits.
    """
    result = Attribution()
    for batch, chosen in zip(batches, positions, strict=True):
        if not len(chosen):
            continue
        with _recorded(model, decoder) as record, torch.enable_grad():
            forward_logits(model, batch.inputs)
        readers = [record[group.module] for group in decoder.groups if not group.writes]
        for rank in chosen.rank.unique().tolist():
            row, time = chosen.row[chosen.rank == rank], chosen.time[chosen.rank == rank]
            logit = record["logits"][row, time, batch.targets[row, time]]
            # One position per response and backward pass, so that the responses' gradients stay apart.
            gradients = iter(torch.autograd.grad(logit.sum(), readers, retain_graph=True))
            with torch.no_grad():
                direction, reconstructed = _frozen_direction(decoder, record, batch, row, time)
                contributions = []
                for group in decoder.groups:
                    activation = record[group.module]
                    if group.writes:
                        weight = model.get_parameter(group.parameter).to(direction.dtype)
                        contributions.append(activation[row, time].to(direction.dtype) * (direction @ weight))
                        reconstructed = reconstructed + contributions[-1].sum(1)
                    else:
                        contributions.append((next(gradients) * activation).to(direction.dtype).sum(1)[row])
                actual = logit.to(direction.dtype)
                error = (reconstructed - actual).abs() / actual.abs().clamp(min=1)
            result.add(contributions, error)
    return result


def _frozen_direction(
    decoder: Decoder, record: dict[str, Tensor], batch: Batch, row: Tensor, time: Tensor
) -> tuple[Tensor, Tensor]:
    """The direction u [P, d] and the embedding's part of the logit [P], in float32 or better."""
    normed, residual = record["normed"][row, time], record["residual"][row, time]
    exact = torch.promote_types(residual.dtype, torch.float32)
    gain = decoder.final_norm.get_parameter("weight").to(exact)
    aligned = gain * residual.to(exact)
    # 1/s by least squares from what the norm really returned, so that its epsilon is included.
    scale = (normed.to(exact) * aligned).sum(1, keepdim=True) / aligned.square().sum(1, keepdim=True)
    direction = decoder.head.weight[batch.targets[row, time]].to(exact) * gain * scale
    return direction, (direction * record["embedded"][row, time].to(exact)).sum(1)


@contextmanager
def _recorded(model: nn.Module, decoder: Decoder) -> Iterator[dict[str, Tensor]]:
    """Record the activations of one forward pass; the graph starts at the first layer's input."""
    record: dict[str, Tensor] = {}
    handles = []

    def keep_input(name: str) -> Any:
        return lambda _module, args: record.__setitem__(name, args[0])

    def keep_output(name: str) -> Any:
        return lambda _module, _args, output: record.__setitem__(name, output)

    def start_graph(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        record["embedded"] = hidden
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    try:
        handles.append(decoder.layers[0].register_forward_pre_hook(start_graph, with_kwargs=True))
        handles.append(decoder.final_norm.register_forward_pre_hook(keep_input("residual")))
        handles.append(decoder.final_norm.register_forward_hook(keep_output("normed")))
        handles.append(decoder.head.register_forward_hook(keep_output("logits")))
        for group in decoder.groups:
            module = model.get_submodule(group.module)
            keep = (
                module.register_forward_pre_hook(keep_input(group.module))
                if group.writes
                else module.register_forward_hook(keep_output(group.module))
            )
            handles.append(keep)
        yield record
    finally:
        for handle in handles:
            handle.remove()
