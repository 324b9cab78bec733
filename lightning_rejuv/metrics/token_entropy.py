"""Entropy of the next-token distribution, averaged over tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rejuv.functional._checks import check_positive
from lightning_rejuv.functional.token_entropy import _token_entropy_check, _token_entropy_update
from lightning_rejuv.metrics._mean import MeanMeasure


class TokenEntropy(MeanMeasure):
    r"""Mean next-token entropy in nats; see :func:`lightning_rejuv.functional.token_entropy`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logits`` (Tensor): ``[..., V]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the positions to measure

    As output of ``compute`` it returns a float32 scalar, NaN where no position was measured or where a
    measured one holds NaN logits.

    Args:
        temperature: the sampling temperature.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``temperature`` is not positive, or shapes do not fit.
        TypeError: a floating mask, or logits that are not floating.

    Example::
        >>> import torch
        >>> metric = TokenEntropy()
        >>> metric.update(torch.zeros(2, 3, 4), torch.tensor([[True, True, False], [False, False, False]]))
        >>> metric.compute()
        tensor(1.3863)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0

    def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def update(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; a batch that is all padding adds nothing."""
        _token_entropy_check(logits, mask, self.temperature)
        self.add(*_token_entropy_update(logits, mask, self.temperature))
