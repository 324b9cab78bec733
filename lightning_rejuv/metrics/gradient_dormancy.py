"""Share of a weight's neurons that hardly receive a gradient, accumulated over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.functional.dormancy_scores import _dormancy_scores_compute
from lightning_rejuv.functional.dormant_fraction import dormant_fraction
from lightning_rejuv.functional.gradient_dormancy import (
    Neurons,
    _gradient_dormancy_check,
    _gradient_dormancy_update,
)
from lightning_rejuv.metrics._measure import Measure


class GradientDormancy(Measure):
    r"""Fraction of gradient-dormant neurons; see :func:`lightning_rejuv.functional.gradient_dormancy`.

    Absolute gradients are summed over updates, so that a neuron counts as dormant only where it was in all.

    As input to ``forward`` and ``update`` the metric accepts

    - ``gradient`` (Tensor): ``[out, in]``, a weight's

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN where no gradient was given.

    Args:
        num_neurons: the weight's number of rows, or columns.
        tau: the threshold on the scores.
        neurons: whether a neuron is a ``"row"`` or a ``"column"`` of the weight.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: a gradient that is no matrix or of another size, a negative τ.
        TypeError: a gradient that is not floating.

    Example::
        >>> metric = GradientDormancy(num_neurons=2)
        >>> metric.update(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    abs_sum: Tensor
    count: Tensor

    def __init__(self, num_neurons: int, tau: float = 0.01, neurons: Neurons = "row", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_neurons", num_neurons)
        _gradient_dormancy_check(torch.zeros(1, 1), neurons, tau)
        self.num_neurons = num_neurons
        self.tau = tau
        self.neurons: Neurons = neurons
        self.add_state("abs_sum", torch.zeros(num_neurons, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, gradient: Tensor) -> None:
        """Add a gradient."""
        _gradient_dormancy_check(gradient, self.neurons, self.tau)
        found = gradient.shape[0 if self.neurons == "row" else 1]
        if found != self.num_neurons:
            raise ValueError(
                f"Expected argument `gradient` to have {self.num_neurons} {self.neurons}s but got {found}."
            )
        self.abs_sum += _gradient_dormancy_update(gradient, self.neurons).to(self.abs_sum.device)
        self.count += 1

    def compute(self) -> Tensor:
        """Fraction over everything since the last reset."""
        if not bool(self.count):
            return torch.tensor(float("nan"), device=self.abs_sum.device)
        return dormant_fraction(_dormancy_scores_compute(self.abs_sum), self.tau).to(torch.float32)
