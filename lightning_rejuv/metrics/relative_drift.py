"""Distance from the base, pooled over tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv._compat import mark_updated
from lightning_rejuv.functional.relative_drift import (
    _relative_drift_check,
    _relative_drift_compute,
    _relative_drift_update,
)
from lightning_rejuv.metrics._measure import Measure


class RelativeDrift(Measure):
    r"""Relative L2 drift of all tensors together, ``(Σ ‖W - W_b‖² / Σ ‖W_b‖²)^½``.

    See :func:`lightning_rejuv.functional.relative_drift`. Give each tensor once: a tied one that is
    given twice counts twice.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (Tensor): any shape, floating
    - ``base`` (Tensor): the base's tensor, of the same shape

    As output of ``compute`` it returns a float32 scalar, NaN where no tensor was given.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the shapes differ.
        TypeError: not floating tensors.

    Example::
        >>> import torch
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

    def add(self, difference: Tensor, base: Tensor) -> None:
        """Add a tensor's sums of squares."""
        self.difference += difference.to(self.difference.device)
        self.base += base.to(self.base.device)

    def absorb(self, difference: Tensor, base: Tensor) -> None:
        """Add sums that were taken elsewhere, as an update of its own."""
        mark_updated(self)
        self.add(difference, base)

    def compute(self) -> Tensor:
        """Drift over everything since the last reset."""
        if not self.update_called:
            return torch.tensor(float("nan"), device=self.difference.device)
        return _relative_drift_compute(self.difference, self.base).to(torch.float32)
