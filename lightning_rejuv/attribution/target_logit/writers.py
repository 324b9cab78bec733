"""The residual writers' exact contributions to a target logit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.attribution.target_logit.frozen_norm import frozen_norm, is_norm
from lightning_rejuv.attribution.target_logit.hooks import (
    at_positions,
    expert_parameters,
    first_argument,
    run_for_hooks,
    target_logits,
)
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.neurons import Decoder, NeuronGroup
from lightning_rejuv.weights.lora import merged_weight


@dataclass
class _Record:
    """Leaves and activations of one forward pass in which only the residual stream carries gradients."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    embedded: Tensor | None = None
    shifts: list[Tensor] = field(default_factory=list)
    normed: Tensor | None = None


class WriterAttribution:
    """Direct contributions of every residual writer, in one forward pass of a batch.

    Every branch (attention, MLP) reads a detached copy of the residual stream, every writer's output is a
    leaf, and the norms outside the branches keep their scale. The logit is then an affine function of the
    leaves, whose gradient at a position is the direction u that the writer's output is projected on: for
    input column j of W with input a the contribution is ``a[j] * (u @ W[:, j])``. What lies between a
    writer and the stream (norms, multipliers, gates, routing weights) is in u.

    Args:
        model: the model in eval mode.
        decoder: its parts.
        batch: a calibration batch on the model's device.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, batch: Batch) -> None:
        self._model = model
        self._groups = [group for group in decoder.groups if group.writes]
        self._batch = batch
        self._head = decoder.head
        head_bias = getattr(decoder.head, "bias", None)
        self._head_bias = head_bias if isinstance(head_bias, Tensor) else None
        self._experts = expert_parameters(model, [g.parameter for g in self._groups if g.expert is not None])
        with _residual_stream_only(model, decoder, self._groups) as record, torch.enable_grad():
            run_for_hooks(model, batch.inputs)
        self._record = record

    def contributions(self, row: Tensor, time: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the contributions at one position of each of some responses.

        Args:
            row: [P] int64, the responses, each at most once.
            time: [P] int64, their positions.

        Returns:
            For each writing group [P, count], and [P] the sum of all contributions, the embedding's and
            the biases' included: the reconstructed logit. float32 or better.
        """
        record = self._record
        assert record.normed is not None
        assert record.embedded is not None
        target = self._batch.targets[row, time]
        with torch.enable_grad():
            logits = target_logits(self._head, record.normed[row, time], target)
        leaves = {"": record.embedded, **record.outputs}
        found = torch.autograd.grad(logits.sum(), list(leaves.values()), retain_graph=True)
        shape = self._batch.inputs["input_ids"].shape
        directions = {
            name: at_positions(gradient, shape, row, time)
            for name, gradient in zip(leaves, found, strict=True)
        }
        with torch.no_grad():
            total = self._constant(logits, target)
            for name, leaf in leaves.items():
                total += (directions[name] * at_positions(leaf, shape, row, time)).sum(1)
        per_response = self._expert_gradients(logits, total)
        return [self._of(group, directions, per_response, row, time) for group in self._groups], total

    def _of(
        self,
        group: NeuronGroup,
        directions: Mapping[str, Tensor],
        per_response: list[dict[str, Tensor]],
        row: Tensor,
        time: Tensor,
    ) -> Tensor:
        if group.expert is not None:
            weight = group.matrix(self._model.get_parameter(group.parameter).detach())
            exact = torch.promote_types(weight.dtype, torch.float32)
            # a[j] (u @ W[:, j]) = <d logit / d W[:, j], W[:, j]>, since the logit is linear in W here.
            products = (group.matrix(g[group.parameter]).to(exact) * weight.to(exact) for g in per_response)
            return torch.stack([product.sum(1 - group.dim) for product in products])
        shape = self._batch.inputs["input_ids"].shape
        activation = at_positions(self._record.inputs[group.module], shape, row, time)
        direction = directions[group.module]
        weight = merged_weight(self._model.get_submodule(group.module))
        return activation * (direction @ weight.to(direction.dtype))

    def _constant(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return what the biases of the frozen norms and of the head add to each logit [P]."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros(len(logits), dtype=exact, device=logits.device)
        if self._head_bias is not None:
            total += self._head_bias[target].to(exact)
        if self._record.shifts:
            for number in range(len(logits)):
                with torch.enable_grad():
                    found = torch.autograd.grad(
                        logits[number], self._record.shifts, retain_graph=True, allow_unused=True
                    )
                for gradient, shift in zip(found, self._record.shifts, strict=True):
                    if gradient is not None:
                        total[number] += (gradient * shift).sum()
        return total

    def _expert_gradients(self, logits: Tensor, total: Tensor) -> list[dict[str, Tensor]]:
        """Return each response's gradient by the experts' weights, and add their part of the logit to ``total``."""
        found = []
        for number in range(len(logits) if self._experts else 0):
            gradients = torch.autograd.grad(
                logits[number], list(self._experts.values()), retain_graph=True, allow_unused=True
            )
            named = {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(self._experts.items(), gradients, strict=True)
            }
            total[number] += sum(
                (named[n] * p.detach()).sum(dtype=total.dtype) for n, p in self._experts.items()
            )
            found.append(named)
        return found


@contextmanager
def _residual_stream_only(
    model: nn.Module, decoder: Decoder, writers: list[NeuronGroup]
) -> Iterator[_Record]:
    record = _Record()
    handles = []

    def embed(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        record.embedded, replaced = first_argument(args, kwargs, lambda x: x.detach().requires_grad_())
        return replaced

    def branch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return first_argument(args, kwargs, Tensor.detach)[1]

    def freeze(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args[0].requires_grad:
            return output
        output, shift = frozen_norm(module, args[0], output)
        record.shifts += [] if shift is None else [shift]
        return output

    def leaf(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            record.inputs[name] = args[0].detach()
            record.outputs[name] = output.detach().requires_grad_()
            return record.outputs[name].clone()  # some families add to a writer's output in place

        return hook

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        record.normed = args[0]

    try:
        handles.append(decoder.first_layer.register_forward_pre_hook(embed, with_kwargs=True))
        handles.append(decoder.head.register_forward_pre_hook(keep))
        inside = {id(m) for b in decoder.branches for m in b.modules()}
        for b in decoder.branches:
            handles.append(b.register_forward_pre_hook(branch, with_kwargs=True))
        for module in model.modules():
            if is_norm(module) and id(module) not in inside:
                handles.append(module.register_forward_hook(freeze))
        for group in writers:
            if group.expert is None:
                handles.append(model.get_submodule(group.module).register_forward_hook(leaf(group.module)))
        yield record
    finally:
        for handle in handles:
            handle.remove()
