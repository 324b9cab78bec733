"""srank_δ of features, pooled over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_fraction
from lightning_rejuv.functional.srank import _srank_compute
from lightning_rejuv.metrics._spectrum import FeatureSpectrum


class SRank(FeatureSpectrum):
    r"""srank_δ; see :func:`lightning_rejuv.functional.srank`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (Tensor): ``[..., num_features]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the rows to use

    As output of ``compute`` it returns a float32 scalar, NaN where no row was given. With fewer rows than
    features it warns, or raises where ``strict``: the sample then limits the rank.

    Args:
        num_features: the features' dimension d; the state takes 8 d² bytes.
        delta: the share of the singular values' sum that may be left out.
        center: subtract the mean row.
        strict: raise, instead of warn, where there are fewer rows than features.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: features of another width, or, where ``strict``, too few rows at ``compute``.
        TypeError: features that are not floating, a floating mask.

    Example::
        >>> metric = SRank(num_features=3)
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(3.)
    """

    higher_is_better: bool | None = True

    def __init__(
        self,
        num_features: int,
        delta: float = 0.01,
        center: bool = False,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, center=center, strict=strict, **kwargs)
        check_fraction("delta", delta)
        self.delta = delta

    def compute(self) -> Tensor:
        """srank_δ of all rows since the last reset."""
        return _srank_compute(super().compute(), self.delta).to(torch.float32)
