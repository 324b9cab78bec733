"""Ranks of features, pooled over batches and processes in a Gram matrix of fixed shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count, check_fraction
from lightning_rejuv.functional.spectrum import (
    _check_rows,
    _effective_rank_compute,
    _spectrum_check,
    _spectrum_compute,
    _spectrum_update,
    _srank_compute,
    _stable_rank_compute,
)
from lightning_rejuv.metrics._measure import LayerValues, Measure


class FeatureSpectrum(Measure):
    """Singular values of the rows seen so far, from the pooled Gram matrix: two processes equal one.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (Tensor): ``[..., num_features]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the rows to use

    As output of ``compute`` it returns ``[num_features]`` singular values in descending order, float64; NaN
    if no row was given or the features were not finite.

    Args:
        num_features: the features' dimension d; the state takes 8 d² bytes.
        center: subtract the mean row.
        strict: raise, instead of warn, if there are fewer rows than features.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: features have another width, or, if ``strict``, there are too few rows at ``compute``.
        TypeError: the features are not floating, or the mask is.
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
                f"Expected argument `features` to have {self.num_features} features but got {features.shape[-1]}."
            )
        self.add(*_spectrum_update(features, mask))

    def compute(self) -> Tensor:
        """Return the singular values [num_features] in descending order."""
        if not bool(self.count):
            if self.update_called:
                self.warn_empty()
            return torch.full_like(self.total, float("nan"))
        self._check_count(int(self.count))
        return _spectrum_compute(self.gram, self.total, self.count, self.center)

    def _check_count(self, count: int) -> None:
        _check_rows(count, self.num_features, self.center, self.strict)


class SiteSpectrum(FeatureSpectrum):
    """The spectrum at a site of a model that is measured again and again, as the monitor does.

    Short responses have fewer positions than a model has features, at every measurement. What their number bounds can
    still be compared with other measurements on the same probe, so that nobody is warned each time.
    """

    def _check_count(self, count: int) -> None:
        pass


class EffectiveRank(FeatureSpectrum):
    r"""Effective rank; see :func:`lightning_rejuv.functional.effective_rank`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (Tensor): ``[..., num_features]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the rows to use

    As output of ``compute`` it returns a float32 scalar, NaN if no row was given. With fewer rows than
    features it warns, or raises if ``strict``: the sample then limits the rank.

    Args:
        num_features: the features' dimension d; the state takes 8 d² bytes.
        center: subtract the mean row.
        strict: raise, instead of warn, if there are fewer rows than features.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: features have another width, or, if ``strict``, there are too few rows at ``compute``.
        TypeError: the features are not floating, or the mask is.

    Example::
        >>> metric = EffectiveRank(num_features=3)
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(3.)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Return the effective rank of all rows since the last reset."""
        return _effective_rank_compute(super().compute()).to(torch.float32)


class StableRank(FeatureSpectrum):
    r"""Stable rank; see :func:`lightning_rejuv.functional.stable_rank`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (Tensor): ``[..., num_features]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the rows to use

    As output of ``compute`` it returns a float32 scalar, NaN if no row was given. With fewer rows than
    features it warns, or raises if ``strict``: the sample then limits the rank.

    Args:
        num_features: the features' dimension d; the state takes 8 d² bytes.
        center: subtract the mean row.
        strict: raise, instead of warn, if there are fewer rows than features.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: features have another width, or, if ``strict``, there are too few rows at ``compute``.
        TypeError: the features are not floating, or the mask is.

    Example::
        >>> metric = StableRank(num_features=3)
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(3.)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Return the stable rank of all rows since the last reset."""
        return _stable_rank_compute(super().compute()).to(torch.float32)


class SRank(FeatureSpectrum):
    r"""srank_δ; see :func:`lightning_rejuv.functional.srank`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (Tensor): ``[..., num_features]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the rows to use

    As output of ``compute`` it returns a float32 scalar, NaN if no row was given. With fewer rows than
    features it warns, or raises if ``strict``: the sample then limits the rank.

    Args:
        num_features: the features' dimension d; the state takes 8 d² bytes.
        delta: the share of the singular values' sum that may be left out.
        center: subtract the mean row.
        strict: raise, instead of warn, if there are fewer rows than features.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: features have another width, ``delta`` lies outside [0, 1], or, if ``strict``, there are too few
            rows at ``compute``.
        TypeError: the features are not floating, or the mask is.

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
        """Return srank_δ of all rows since the last reset."""
        return _srank_compute(super().compute(), self.delta).to(torch.float32)


_RANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "effective_rank": _effective_rank_compute,
    "stable_rank": _stable_rank_compute,
    "srank": lambda sigma: _srank_compute(sigma, 0.01),
}


def rank_values(spectra: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LayerValues]:
    """Return the means over sites of the rank measures, and those of each site.

    Args:
        spectra: per site the singular values ``[d]`` in descending order.
    """
    layers = {name: {site: float(f(s)) for site, s in spectra.items()} for name, f in _RANKS.items()}
    totals = {
        name: torch.tensor(list(sites.values()), dtype=torch.float64).mean() for name, sites in layers.items()
    }
    return totals, layers
