"""Probability of the most likely next token, averaged over tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rejuv.functional._checks import check_positive
from lightning_rejuv.functional.token_entropy import _token_entropy_check
from lightning_rejuv.functional.top1_confidence import _top1_confidence_update
from lightning_rejuv.metrics._mean import MeanMeasure


class Top1Confidence(MeanMeasure):
    r"""Mean largest probability; see :func:`lightning_rejuv.functional.top1_confidence`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logits`` (Tensor): ``[..., V]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the positions to measure

    As output of ``compute`` it returns a float32 scalar, NaN where no position was measured.

    Args:
        temperature: the sampling temperature.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``temperature`` is not positive, or shapes do not fit.
        TypeError: a floating mask, or logits that are not floating.

    Example::
        >>> import torch
        >>> metric = Top1Confidence()
        >>> metric.update(torch.zeros(2, 3, 4))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def update(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; a batch that is all padding adds nothing."""
        _token_entropy_check(logits, mask, self.temperature)
        self.add(*_top1_confidence_update(logits, mask, self.temperature))
