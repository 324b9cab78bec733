"""Entropy gap to the base, averaged over tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rejuv.functional._checks import check_positive
from lightning_rejuv.functional.entropy_gap import _entropy_gap_check, _entropy_gap_update
from lightning_rejuv.metrics._mean import MeanMeasure


class EntropyGap(MeanMeasure):
    r"""Mean absolute entropy gap to the base; see :func:`lightning_rejuv.functional.entropy_gap`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logits`` (Tensor): ``[..., V]``, floating
    - ``base_logits`` (Tensor): ``[..., V']``, the base's at the same positions
    - ``mask`` (Tensor, optional): ``[...]`` bool, the positions to measure

    As output of ``compute`` it returns a float32 scalar in nats, NaN where no position was measured.

    Args:
        temperature: the sampling temperature, of both models.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``temperature`` is not positive, or shapes do not fit.
        TypeError: a floating mask, or logits that are not floating.

    Example::
        >>> import torch
        >>> metric = EntropyGap()
        >>> metric.update(torch.zeros(1, 2), torch.zeros(1, 8))
        >>> metric.compute()
        tensor(1.3863)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def update(self, logits: Tensor, base_logits: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; a batch that is all padding adds nothing."""
        _entropy_gap_check(logits, base_logits, mask, self.temperature)
        self.add(*_entropy_gap_update(logits, base_logits, mask, self.temperature))
