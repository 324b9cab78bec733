"""Share of activations that are not (nearly) zero, pooled over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional.active_fraction import _active_fraction_compute, _threshold_check
from lightning_rejuv.metrics._activations import ActivationStatistics


class ActiveFraction(ActivationStatistics):
    r"""Fraction of active (token, neuron) pairs; see :func:`lightning_rejuv.functional.active_fraction`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``activations`` (Tensor): ``[..., num_neurons]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the tokens to use

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN where no token was given.

    Args:
        num_neurons: the activations' last dimension.
        threshold: the largest absolute value that counts as inactive.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: activations of another width, another shape of the mask, a negative threshold.
        TypeError: activations that are not floating, a floating mask.

    Example::
        >>> metric = ActiveFraction(num_neurons=2)
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool | None = True
    plot_upper_bound: float | None = 1.0

    def __init__(self, num_neurons: int, threshold: float = 0.0, **kwargs: Any) -> None:
        _threshold_check(threshold)
        super().__init__(num_neurons, threshold, **kwargs)

    def compute(self) -> Tensor:
        """Fraction over everything since the last reset."""
        stats = self.stats()
        return _active_fraction_compute(stats.near_zero, stats.tokens).to(torch.float32)
