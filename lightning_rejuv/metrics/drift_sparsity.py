"""Share of weights that have not moved from the base, over tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rejuv.functional.drift_sparsity import _drift_sparsity_update, _tolerance_check
from lightning_rejuv.functional.relative_drift import _relative_drift_check
from lightning_rejuv.metrics._mean import MeanMeasure


class DriftSparsity(MeanMeasure):
    r"""Fraction of unmoved coordinates of all tensors; see :func:`lightning_rejuv.functional.drift_sparsity`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (Tensor): any shape, floating
    - ``base`` (Tensor): the base's tensor, of the same shape

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN where no tensor was given.

    Args:
        tolerance: the largest absolute change that counts as none.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the shapes differ, or the tolerance is negative.
        TypeError: not floating tensors.

    Example::
        >>> import torch
        >>> metric = DriftSparsity()
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        >>> metric.compute()
        tensor(0.5000)
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _tolerance_check(tolerance)
        self.tolerance = tolerance

    def update(self, weight: Tensor, base: Tensor) -> None:
        """Add a tensor and the base's."""
        _relative_drift_check(weight, base, "tensor")
        self.add(*_drift_sparsity_update(weight, base, self.tolerance))
