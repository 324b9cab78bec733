"""What the activation measures share: each neuron's sums over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv._compat import mark_updated
from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.functional.dormancy_scores import _activations_check
from lightning_rejuv.metrics._mean import warn_empty
from lightning_rejuv.metrics._measure import Measure
from lightning_rejuv.ops import ActivationStats, activation_stats, merge_activation_stats


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
        ValueError: activations of another width, another shape of the mask.
        TypeError: activations that are not floating, a floating mask.
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
                f"Expected argument `activations` to have {self.num_neurons} neurons but got "
                f"{activations.shape[-1]}."
            )
        activation_stats(activations, mask, eps=self.threshold, out=self.table)

    def add(self, table: Tensor) -> None:
        """Add another table of the same shape."""
        self.table = merge_activation_stats(torch.stack([self.table, table.to(self.table.device)]))

    def absorb(self, table: Tensor) -> None:
        """Add sums that were taken elsewhere, as an update of its own."""
        mark_updated(self)
        self.add(table)

    def stats(self) -> ActivationStats:
        """The table's rows by name; NaN, with a warning, where no token was given."""
        if self.update_called and not bool(self.table[-1, 0]):
            warn_empty(self)
        table = torch.where(self.table[-1] > 0, self.table, float("nan"))
        return ActivationStats(*table.unbind(0))

    def compute(self) -> Tensor:
        """The table [7, num_neurons] over everything since the last reset."""
        return torch.stack(self.stats())
