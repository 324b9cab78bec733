"""The readers' gradient × activation for a target logit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.attribution.target_logit.hooks import (
    by_token,
    expert_parameters,
    first_argument,
    run_for_hooks,
    target_logits,
)
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.neurons import Decoder, NeuronGroup


class ReaderAttribution:
    """Gradient × activation of every reader, summed over the sequence, from one forward pass of a batch.

    The activation is the projection's output, its bias included, before rotary embedding and before a
    norm of queries and keys. For the experts of a mixture, whose activations no module returns, the same
    number is taken from the gradient by the weight: Σ_t ∂z/∂y_t y_t = ⟨∂z/∂W, W⟩ + ∂z/∂b b, row by row.

    Args:
        model: the model in eval mode.
        decoder: its parts.
        batch: a calibration batch on the model's device.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, batch: Batch) -> None:
        self._model = model
        self._head = decoder.head
        self._groups = [group for group in decoder.groups if not group.writes]
        self._batch = batch
        self._experts = expert_parameters(model, [g.parameter for g in self._groups if g.expert is not None])
        modules = list(dict.fromkeys(g.module for g in self._groups if g.expert is None))
        with _recorded(model, decoder, modules) as record, torch.enable_grad():
            run_for_hooks(model, batch.inputs)
        self._normed = record.pop("normed")
        self._activations = record

    def logits(self, row: Tensor, time: Tensor) -> Tensor:
        """Return the target logits [P] at positions of the batch, without gradient, in float32 or better."""
        found = target_logits(self._head, self._normed[row, time], self._batch.targets[row, time]).detach()
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def contributions(self, row: Tensor, time: Tensor) -> list[Tensor]:
        """Return the contributions at one position of each of some responses.

        Args:
            row: [P] int64, the responses, each at most once, so that their gradients stay apart.
            time: [P] int64, their positions.

        Returns:
            For each reading group [P, count], float32 or better.
        """
        logits = target_logits(self._head, self._normed[row, time], self._batch.targets[row, time])
        found = torch.autograd.grad(logits.sum(), list(self._activations.values()), retain_graph=True)
        shape = self._batch.inputs["input_ids"].shape
        products = {}
        for (name, activation), gradient in zip(self._activations.items(), found, strict=True):
            exact = torch.promote_types(activation.dtype, torch.float32)
            gradient, value = (by_token(x, shape)[row].to(exact) for x in (gradient, activation.detach()))
            products[name] = (gradient * value).sum(1)
        per_response = [
            dict(
                zip(
                    self._experts,
                    torch.autograd.grad(
                        logit, list(self._experts.values()), retain_graph=True, allow_unused=True
                    ),
                    strict=True,
                )
            )
            for logit in (logits if self._experts else ())
        ]
        return [
            group.own(products[group.module])
            if group.expert is None
            else torch.stack([self._of_expert(group, gradients) for gradients in per_response])
            for group in self._groups
        ]

    def _of_expert(self, group: NeuronGroup, gradients: Mapping[str, Tensor | None]) -> Tensor:
        total = torch.zeros((), device=self._normed.device)
        for name in (group.parameter, group.bias):
            gradient = gradients.get(name) if name else None
            if name is None or gradient is None:
                continue
            value = group.matrix(self._model.get_parameter(name).detach())
            exact = torch.promote_types(value.dtype, torch.float32)
            product = group.matrix(gradient).to(exact) * value.to(exact)
            total = total + group.own(product.sum(1 - group.dim) if product.dim() == 2 else product)
        return total.expand(group.count)


@contextmanager
def _recorded(model: nn.Module, decoder: Decoder, modules: list[str]) -> Iterator[dict[str, Tensor]]:
    """Record modules' outputs in one forward pass; the graph starts at the first layer's input."""
    record: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _args, output: record.__setitem__(name, output)

    def start_graph(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return first_argument(args, kwargs, lambda x: x.detach().requires_grad_())[1]

    handles = [
        decoder.first_layer.register_forward_pre_hook(start_graph, with_kwargs=True),
        decoder.head.register_forward_pre_hook(lambda _module, args: record.__setitem__("normed", args[0])),
        *(model.get_submodule(name).register_forward_hook(keep(name)) for name in modules),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
