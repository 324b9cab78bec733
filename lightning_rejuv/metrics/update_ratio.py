"""Size of an optimizer step relative to the weights, over all tensors."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.metrics.relative_drift import RelativeDrift


class UpdateRatio(RelativeDrift):
    r"""Relative size of an optimizer step, ``‖W_t - W_{t-1}‖ / ‖W_{t-1}‖``.

    See :func:`lightning_rejuv.functional.update_ratio`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (Tensor): any shape, floating, after the step
    - ``previous`` (Tensor): a copy from before the step

    As output of ``compute`` it returns a float32 scalar, pooled over the tensors; NaN where none was given.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the shapes differ.
        TypeError: not floating tensors.

    Example::
        >>> import torch
        >>> metric = UpdateRatio()
        >>> metric.update(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0]))
        >>> metric.compute()
        tensor(0.2000)
    """

    higher_is_better: bool | None = None

    def update(self, weight: Tensor, previous: Tensor) -> None:
        """Add a tensor and its copy from before the step."""
        super().update(weight, previous)
