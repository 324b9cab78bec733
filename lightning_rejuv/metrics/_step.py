"""Gradient and update of one optimizer step: the RL stage's gradient norm against its update size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_rejuv.functional.dormancy_scores import _dormancy_scores_compute
from lightning_rejuv.functional.dormant_fraction import dormant_fraction
from lightning_rejuv.functional.gradient_dormancy import _gradient_dormancy_update
from lightning_rejuv.functional.relative_drift import _relative_drift_compute, _relative_drift_update
from lightning_rejuv.metrics._sites import writes_residual
from lightning_rejuv.names import canonical_name

GRADIENT_TAU = 0.01


class StepMeasures:
    """Measures of one step, from just before it to just after it; holds a copy of the weights in between.

    Attributes:
        layers: gradient dormancy by parameter.
    """

    def __init__(self) -> None:
        self.layers: dict[str, float] = {}
        self._gradient_norm: Tensor | None = None
        self._dormancy = torch.tensor(float("nan"))
        self._previous: dict[str, Tensor] = {}

    @torch.no_grad()
    def before(self, model: nn.Module) -> None:
        """Take the gradients as they are, before clipping, and copy the weights that have one."""
        parameters = {name: p for name, p in model.named_parameters() if p.grad is not None}
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
        self._gradient_norm = torch.stack(squares).sum().sqrt() if squares else None
        scores = {}
        for name, parameter in parameters.items():
            if parameter.ndim == 2 and parameter.grad is not None:
                neurons = "column" if writes_residual(canonical_name(name)) else "row"
                scores[name] = _dormancy_scores_compute(_gradient_dormancy_update(parameter.grad, neurons))
        if scores:
            self._dormancy = dormant_fraction(torch.cat(list(scores.values())), GRADIENT_TAU)
        self.layers = {name: float(dormant_fraction(s, GRADIENT_TAU)) for name, s in scores.items()}
        self._previous = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def after(self, model: nn.Module) -> dict[str, Tensor]:
        """Compare the weights with the copy, give the copy up and return the step's measures."""
        if self._gradient_norm is None:
            return {}
        parameters = dict(model.named_parameters())
        sums = [_relative_drift_update(parameters[name], old) for name, old in self._previous.items()]
        difference = torch.stack([d for d, _ in sums]).sum()
        previous = torch.stack([b for _, b in sums]).sum()
        values = {
            "gradient_norm": self._gradient_norm,
            "gradient_dormancy": self._dormancy,
            "update_norm": difference.sqrt(),
            "update_ratio": _relative_drift_compute(difference, previous),
        }
        self._previous, self._gradient_norm = {}, None
        return {name: value.to(torch.float32) for name, value in values.items()}
