"""Share of a layer's neurons that are dormant, pooled over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional.dormancy_scores import _dormancy_scores_compute
from lightning_rejuv.functional.dormant_fraction import _tau_check, dormant_fraction
from lightning_rejuv.metrics._activations import ActivationStatistics


class DormantFraction(ActivationStatistics):
    r"""Fraction of τ-dormant neurons of one layer; see :func:`lightning_rejuv.functional.dormant_fraction`.

    Identically zero on smooth activations: look at :meth:`scores` there, never at the fraction.

    As input to ``forward`` and ``update`` the metric accepts

    - ``activations`` (Tensor): ``[..., num_neurons]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the tokens to use

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN where no token was given.

    Args:
        num_neurons: the activations' last dimension.
        tau: the threshold on the scores.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: activations of another width, another shape of the mask, a negative τ.
        TypeError: activations that are not floating, a floating mask.

    Example::
        >>> metric = DormantFraction(num_neurons=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
        >>> metric.compute(), metric.scores()
        (tensor(0.5000), tensor([2., 0.], dtype=torch.float64))
    """

    higher_is_better: bool | None = False
    plot_upper_bound: float | None = 1.0

    def __init__(self, num_neurons: int, tau: float = 0.025, **kwargs: Any) -> None:
        super().__init__(num_neurons, **kwargs)
        _tau_check(tau)
        self.tau = tau

    def scores(self) -> Tensor:
        """Dormancy score of each neuron, [num_neurons] float64, of this process alone."""
        return _dormancy_scores_compute(self.stats().abs_sum)

    def compute(self) -> Tensor:
        """Fraction over everything since the last reset."""
        return dormant_fraction(self.scores(), self.tau).to(torch.float32)
