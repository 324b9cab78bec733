"""Measures of how far weights have moved: from the base, over all tensors, and in one optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.functional._checks import check_not_negative
from lightning_rejuv.functional.activations import (
    _dormancy_scores_compute,
    _gradient_dormancy_update,
    dormant_fraction,
)
from lightning_rejuv.functional.weights import (
    _drift_sparsity_update,
    _relative_drift_check,
    _relative_drift_compute,
    _relative_drift_update,
)
from lightning_rejuv.metrics._measure import MeanMeasure, Measure
from lightning_rejuv.metrics._recorder import writes_residual
from lightning_rejuv.names import canonical_name

GRADIENT_TAU = 0.01


class RelativeDrift(Measure):
    r"""Relative L2 drift of all tensors together, ``(Σ ‖W - W_b‖² / Σ ‖W_b‖²)^½``.

    See :func:`lightning_rejuv.functional.relative_drift`. Give each tensor once: a tied one that is
    given twice counts twice.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (Tensor): any shape, floating
    - ``base`` (Tensor): the base's tensor, of the same shape

    As output of ``compute`` it returns a float32 scalar, NaN if no tensor was given.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the shapes differ.
        TypeError: the tensors are not floating.

    Example::
        >>> metric = RelativeDrift()
        >>> metric.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
        >>> metric.update(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> metric.compute()
        tensor(0.3015)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    difference: Tensor
    base: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("difference", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("base", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, weight: Tensor, base: Tensor) -> None:
        """Add a tensor and the base's."""
        _relative_drift_check(weight, base, "tensor")
        self.add(*_relative_drift_update(weight, base))

    def compute(self) -> Tensor:
        """Return the drift over everything since the last reset."""
        if not self.update_called:
            return torch.tensor(float("nan"), device=self.difference.device)
        return _relative_drift_compute(self.difference, self.base).to(torch.float32)


class UpdateRatio(RelativeDrift):
    r"""Relative size of an optimizer step, ``‖W_t - W_{t-1}‖ / ‖W_{t-1}‖``.

    See :func:`lightning_rejuv.functional.update_ratio`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (Tensor): any shape, floating, after the step
    - ``previous`` (Tensor): a copy from before the step

    As output of ``compute`` it returns a float32 scalar, pooled over the tensors; NaN if none was given.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the shapes differ.
        TypeError: the tensors are not floating.

    Example::
        >>> metric = UpdateRatio()
        >>> metric.update(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0]))
        >>> metric.compute()
        tensor(0.2000)
    """

    higher_is_better: bool | None = None

    def update(self, weight: Tensor, previous: Tensor) -> None:
        """Add a tensor and its copy from before the step."""
        super().update(weight, previous)


class DriftSparsity(MeanMeasure):
    r"""Fraction of unmoved coordinates of all tensors; see :func:`lightning_rejuv.functional.drift_sparsity`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (Tensor): any shape, floating
    - ``base`` (Tensor): the base's tensor, of the same shape

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN if no tensor was given.

    Args:
        tolerance: the largest absolute change that counts as none.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the shapes differ, or the tolerance is negative.
        TypeError: the tensors are not floating.

    Example::
        >>> metric = DriftSparsity()
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        >>> metric.compute()
        tensor(0.5000)
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_not_negative("tolerance", tolerance)
        self.tolerance = tolerance

    def update(self, weight: Tensor, base: Tensor) -> None:
        """Add a tensor and the base's."""
        _relative_drift_check(weight, base, "tensor")
        self.add(*_drift_sparsity_update(weight, base, self.tolerance))


class StepMeasures:
    """Gradient and update of one optimizer step; a copy of the weights is held between its two calls.

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
