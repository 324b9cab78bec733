"""Entropy of attention distributions, head by head, averaged over queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.functional.attention_entropy import _attention_entropy_check, _attention_entropy_update
from lightning_rejuv.metrics._mean import warn_empty
from lightning_rejuv.metrics._measure import Measure


class AttentionEntropy(Measure):
    r"""Mean entropy of each head's attention; see :func:`lightning_rejuv.functional.attention_entropy`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``attention`` (Tensor): ``[B, num_heads, Q, K]`` probabilities
    - ``mask`` (Tensor, optional): ``[B, Q]`` bool, the queries to use

    As output of ``compute`` it returns ``[num_heads]`` float32, nats; NaN where no query was given.

    Args:
        num_heads: the number of heads.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: attention of another rank or number of heads, another shape of the mask.
        TypeError: attention that is not floating, a floating mask.

    Example::
        >>> metric = AttentionEntropy(num_heads=2)
        >>> metric.update(torch.full((1, 2, 1, 2), 0.5))
        >>> metric.compute()
        tensor([0.6931, 0.6931])
    """

    plot_lower_bound: float | None = 0.0

    total: Tensor
    count: Tensor

    def __init__(self, num_heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_heads", num_heads)
        self.num_heads = num_heads
        self.add_state("total", torch.zeros(num_heads, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, attention: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch's attention."""
        _attention_entropy_check(attention, mask)
        if attention.shape[1] != self.num_heads:
            raise ValueError(
                f"Expected argument `attention` to have {self.num_heads} heads but got {attention.shape[1]}."
            )
        total, count = _attention_entropy_update(attention, mask)
        self.total += total.to(self.total.device)
        self.count += count.to(self.count.device)

    def compute(self) -> Tensor:
        """Entropies [num_heads] over everything since the last reset."""
        if self.update_called and not bool(self.count):
            warn_empty(self)
        return (self.total / self.count).to(torch.float32)
