"""What the rank measures share: a Gram matrix of fixed shape, whatever the number of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv._compat import mark_updated
from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.functional._spectrum import (
    _check_rows,
    _spectrum_check,
    _spectrum_compute,
    _spectrum_update,
)
from lightning_rejuv.metrics._mean import warn_empty
from lightning_rejuv.metrics._measure import Measure


class FeatureSpectrum(Measure):
    """Singular values of the rows seen so far, from the pooled Gram matrix: two processes equal one.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (Tensor): ``[..., num_features]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the rows to use

    As output of ``compute`` it returns ``[num_features]`` singular values in descending order, float64; NaN
    where no row was given or the features were not finite.

    Args:
        num_features: the features' dimension d; the state takes 8 d² bytes.
        center: subtract the mean row.
        strict: raise, instead of warn, where there are fewer rows than features.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: features of another width, or, where ``strict``, too few rows at ``compute``.
        TypeError: features that are not floating, a floating mask.
    """

    plot_lower_bound: float | None = 0.0

    gram: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, num_features: int, center: bool = False, strict: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_features", num_features)
        self.num_features = num_features
        self.center = center
        self.strict = strict
        zeros = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.add_state("gram", zeros, dist_reduce_fx="sum")
        self.add_state("total", zeros[0].clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch's rows."""
        _spectrum_check(features, mask)
        if features.shape[-1] != self.num_features:
            raise ValueError(
                f"Expected argument `features` to have {self.num_features} features but got "
                f"{features.shape[-1]}."
            )
        self.add(*_spectrum_update(features, mask))

    def add(self, gram: Tensor, total: Tensor, count: Tensor) -> None:
        """Add a batch's Gram matrix, sum and number of rows."""
        self.gram += gram.to(self.gram.device)
        self.total += total.to(self.total.device)
        self.count += count.to(self.count.device)

    def absorb(self, gram: Tensor, total: Tensor, count: Tensor) -> None:
        """Add sums that were taken elsewhere, as an update of its own."""
        mark_updated(self)
        self.add(gram, total, count)

    def compute(self) -> Tensor:
        """Singular values [num_features] in descending order."""
        if not bool(self.count):
            if self.update_called:
                warn_empty(self)
            return torch.full_like(self.total, float("nan"))
        self._check_count(int(self.count))
        return _spectrum_compute(self.gram, self.total, self.count, self.center)

    def _check_count(self, count: int) -> None:
        _check_rows(count, self.num_features, self.center, self.strict)


class SiteSpectrum(FeatureSpectrum):
    """The spectrum at a site of a model that is measured again and again, as the monitor does.

    Short responses have fewer positions than a model has features, on every measurement. What their number bounds can
    still be compared with the same probe's other measurements, so that nobody is warned each time.
    """

    def _check_count(self, count: int) -> None:
        pass
