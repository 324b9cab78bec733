"""What the averaged measures share: a sum, a count, NaN and a warning where nothing was measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_rejuv._compat import mark_updated
from lightning_rejuv.metrics._measure import Measure


class MeanMeasure(Measure):
    """A count-weighted mean, so that batches, and processes, of unequal size are weighted rightly.

    Subclasses call :meth:`add` from ``update`` with the sums of their functional twin.
    """

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, total: Tensor, count: Tensor) -> None:
        """Add a batch's sum and number of values; on the device, without a host sync."""
        self.total += total.to(self.total.device)
        self.count += count.to(self.count.device)

    def absorb(self, total: Tensor, count: Tensor) -> None:
        """Add sums that were taken elsewhere, as an update of its own."""
        mark_updated(self)
        self.add(total, count)

    def compute(self) -> Tensor:
        """Mean over everything since the last reset, float32; NaN, with a warning, where that is nothing."""
        if self.update_called and not bool(self.count):
            warn_empty(self)
        return (self.total / self.count).to(torch.float32)


def warn_empty(metric: Measure) -> None:
    """Warn that a measure is NaN since no position was measured."""
    rank_zero_warn(f"{type(metric).__name__} is NaN: its updates held nothing to measure (only padding?).")
