"""Stable rank of features, pooled over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional.stable_rank import _stable_rank_compute
from lightning_rejuv.metrics._spectrum import FeatureSpectrum


class StableRank(FeatureSpectrum):
    r"""Stable rank; see :func:`lightning_rejuv.functional.stable_rank`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (Tensor): ``[..., num_features]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the rows to use

    As output of ``compute`` it returns a float32 scalar, NaN where no row was given. With fewer rows than
    features it warns, or raises where ``strict``: the sample then limits the rank.

    Args:
        num_features: the features' dimension d; the state takes 8 d² bytes.
        center: subtract the mean row.
        strict: raise, instead of warn, where there are fewer rows than features.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: features of another width, or, where ``strict``, too few rows at ``compute``.
        TypeError: features that are not floating, a floating mask.

    Example::
        >>> metric = StableRank(num_features=3)
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(3.)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Stable rank of all rows since the last reset."""
        return _stable_rank_compute(super().compute()).to(torch.float32)
