"""Measures of how much each neuron says, and of how much gradient it receives, pooled over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count, check_not_negative
from lightning_rejuv.functional.activations import (
    Neurons,
    _activations_check,
    _active_fraction_compute,
    _dormancy_scores_compute,
    _gradient_dormancy_check,
    _gradient_dormancy_update,
    dormant_fraction,
)
from lightning_rejuv.metrics._measure import LayerValues, Measure
from lightning_rejuv.ops import ActivationStats, activation_stats, merge_activation_stats

#: Low quantile of the dormancy scores that is published beside the dormant fraction.
QUANTILE = 0.05


class ActivationStatistics(Measure):
    """Per-neuron statistics of activations, in one table of fixed shape: two processes equal one.

    As input to ``forward`` and ``update`` the metric accepts

    - ``activations`` (Tensor): ``[..., num_neurons]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the tokens to use

    As output of ``compute`` it returns the table ``[7, num_neurons]``, float64, whose rows
    :class:`lightning_rejuv.ops.ActivationStats` names.

    Args:
        num_neurons: the activations' last dimension.
        threshold: the largest absolute value that counts as near zero.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: activations have another width, or the mask has another shape.
        TypeError: the activations are not floating, or the mask is.
    """

    plot_lower_bound: float | None = 0.0

    table: Tensor

    def __init__(self, num_neurons: int, threshold: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_neurons", num_neurons)
        self.num_neurons = num_neurons
        self.threshold = threshold
        rows = len(ActivationStats._fields)
        self.add_state(
            "table",
            torch.zeros(rows, num_neurons, dtype=torch.float64),
            dist_reduce_fx=merge_activation_stats,
        )

    def update(self, activations: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch's tokens."""
        _activations_check(activations, mask)
        if activations.shape[-1] != self.num_neurons:
            raise ValueError(
                f"Expected argument `activations` to have {self.num_neurons} neurons but got {activations.shape[-1]}."
            )
        activation_stats(activations, mask, eps=self.threshold, out=self.table)

    def add(self, *sums: Tensor) -> None:
        """Merge another table of the same shape, of which not every row is a sum."""
        self.table = merge_activation_stats(
            torch.stack([self.table, *(s.to(self.table.device) for s in sums)])
        )

    def stats(self) -> ActivationStats:
        """Return the table's rows by name; NaN, with a warning, if no token was given."""
        if self.update_called and not bool(self.table[-1, 0]):
            self.warn_empty()
        table = torch.where(self.table[-1] > 0, self.table, float("nan"))
        return ActivationStats(*table.unbind(0))

    def compute(self) -> Tensor:
        """Return the table [7, num_neurons] over everything since the last reset."""
        return torch.stack(self.stats())


class DormantFraction(ActivationStatistics):
    r"""Fraction of τ-dormant neurons of one layer; see :func:`lightning_rejuv.functional.dormant_fraction`.

    It is identically zero on smooth activations: look at their :meth:`scores`, never at the fraction.

    As input to ``forward`` and ``update`` the metric accepts

    - ``activations`` (Tensor): ``[..., num_neurons]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the tokens to use

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN if no token was given.

    Args:
        num_neurons: the activations' last dimension.
        tau: the threshold on the scores.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: activations have another width, the mask has another shape, or τ is negative.
        TypeError: the activations are not floating, or the mask is.

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
        check_not_negative("tau", tau)
        self.tau = tau

    def scores(self) -> Tensor:
        """Return the dormancy score of each neuron, [num_neurons] float64, of this process alone."""
        return _dormancy_scores_compute(self.stats().abs_sum)

    def compute(self) -> Tensor:
        """Return the fraction over everything since the last reset."""
        return dormant_fraction(self.scores(), self.tau).to(torch.float32)


class ActiveFraction(ActivationStatistics):
    r"""Fraction of active (token, neuron) pairs; see :func:`lightning_rejuv.functional.active_fraction`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``activations`` (Tensor): ``[..., num_neurons]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the tokens to use

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN if no token was given.

    Args:
        num_neurons: the activations' last dimension.
        threshold: the largest absolute value that counts as inactive.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: activations have another width, the mask has another shape, or the threshold is negative.
        TypeError: the activations are not floating, or the mask is.

    Example::
        >>> metric = ActiveFraction(num_neurons=2)
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool | None = True
    plot_upper_bound: float | None = 1.0

    def __init__(self, num_neurons: int, threshold: float = 0.0, **kwargs: Any) -> None:
        check_not_negative("threshold", threshold)
        super().__init__(num_neurons, threshold, **kwargs)

    def compute(self) -> Tensor:
        """Return the fraction over everything since the last reset."""
        stats = self.stats()
        return _active_fraction_compute(stats.near_zero, stats.tokens).to(torch.float32)


class GradientDormancy(Measure):
    r"""Fraction of gradient-dormant neurons; see :func:`lightning_rejuv.functional.gradient_dormancy`.

    Absolute gradients are summed over updates, so that a neuron counts as dormant only if it was so in all.

    As input to ``forward`` and ``update`` the metric accepts

    - ``gradient`` (Tensor): ``[out, in]``, that of a weight

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN if no gradient was given.

    Args:
        num_neurons: the weight's number of rows, or columns.
        tau: the threshold on the scores.
        neurons: whether a neuron is a ``"row"`` or a ``"column"`` of the weight.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: a gradient is no matrix or has another size, or τ is negative.
        TypeError: a gradient is not floating.

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
        """Return the fraction over everything since the last reset."""
        if not bool(self.count):
            return torch.tensor(float("nan"), device=self.abs_sum.device)
        return dormant_fraction(_dormancy_scores_compute(self.abs_sum), self.tau).to(torch.float32)


def activation_values(tables: Mapping[str, Tensor], tau: float) -> tuple[dict[str, Tensor], LayerValues]:
    """Return the measures over all sites' neurons together, and those of each site.

    Args:
        tables: per site the table ``[7, N]`` of :func:`lightning_rejuv.ops.activation_stats`.
        tau: the dormancy threshold.
    """
    stats = {site: ActivationStats(*table.unbind(0)) for site, table in tables.items()}
    scores = site_scores(tables)
    pooled = torch.cat(list(scores.values())) if scores else torch.zeros(0, dtype=torch.float64)
    active = torch.tensor(float("nan"))
    if stats:
        near_zero, tokens = zip(*((s.near_zero, s.tokens) for s in stats.values()), strict=True)
        active = _active_fraction_compute(torch.cat(near_zero), torch.cat(tokens))
    totals = {
        "dormant_fraction": dormant_fraction(pooled, tau),
        "dormancy_score_low": _low(pooled),
        "active_fraction": active,
    }
    layers = {
        "dormant_fraction": {site: float(dormant_fraction(s, tau)) for site, s in scores.items()},
        "dormancy_score_low": {site: float(_low(s)) for site, s in scores.items()},
        "active_fraction": {
            site: float(_active_fraction_compute(s.near_zero, s.tokens)) for site, s in stats.items()
        },
    }
    return totals, layers


def site_scores(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the dormancy scores ``[N]`` of each site's neurons."""
    stats = {site: ActivationStats(*table.unbind(0)) for site, table in tables.items()}
    return {site: _dormancy_scores_compute(s.abs_sum) for site, s in stats.items()}


def _low(scores: Tensor) -> Tensor:
    """Return the low quantile of the scores; NaN if there are none, or one is NaN."""
    if scores.numel() == 0 or bool(torch.isnan(scores).any()):
        return torch.tensor(float("nan"), dtype=torch.float64, device=scores.device)
    rank = max(1, round(QUANTILE * scores.numel()))
    return scores.kthvalue(rank).values
