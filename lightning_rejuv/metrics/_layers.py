"""Values per site and their aggregates, from the sums that the monitor keeps for each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_rejuv.functional.active_fraction import _active_fraction_compute
from lightning_rejuv.functional.dormancy_scores import _dormancy_scores_compute
from lightning_rejuv.functional.dormant_fraction import dormant_fraction
from lightning_rejuv.functional.effective_rank import _effective_rank_compute
from lightning_rejuv.functional.srank import _srank_compute
from lightning_rejuv.functional.stable_rank import _stable_rank_compute
from lightning_rejuv.ops import ActivationStats

LayerValues = dict[str, dict[str, float]]

#: Low quantile of the dormancy scores that is published beside the dormant fraction.
QUANTILE = 0.05

_RANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "effective_rank": _effective_rank_compute,
    "stable_rank": _stable_rank_compute,
    "srank": lambda sigma: _srank_compute(sigma, 0.01),
}


def activation_values(tables: Mapping[str, Tensor], tau: float) -> tuple[dict[str, Tensor], LayerValues]:
    """Return the measures over all sites' neurons together, and those of each site.

    Args:
        tables: per site the table ``[7, N]`` of :func:`lightning_rejuv.ops.activation_stats`.
        tau: the dormancy threshold.
    """
    stats = {site: ActivationStats(*table.unbind(0)) for site, table in tables.items()}
    scores = site_scores(tables)
    pooled = torch.cat(list(scores.values())) if scores else torch.zeros(0, dtype=torch.float64)
    near_zero = [s.near_zero for s in stats.values()]
    tokens = [s.tokens for s in stats.values()]
    totals = {
        "dormant_fraction": dormant_fraction(pooled, tau),
        "dormancy_score_low": _low(pooled),
        "active_fraction": _active_fraction_compute(torch.cat(near_zero), torch.cat(tokens))
        if stats
        else torch.tensor(float("nan")),
    }
    layers = {
        "dormant_fraction": {site: float(dormant_fraction(s, tau)) for site, s in scores.items()},
        "dormancy_score_low": {site: float(_low(s)) for site, s in scores.items()},
        "active_fraction": {
            site: float(_active_fraction_compute(s.near_zero, s.tokens)) for site, s in stats.items()
        },
    }
    return totals, layers


def site_scores(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the dormancy scores ``[N]`` of each site's neurons."""
    stats = {site: ActivationStats(*table.unbind(0)) for site, table in tables.items()}
    return {site: _dormancy_scores_compute(s.abs_sum) for site, s in stats.items()}


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


def _low(scores: Tensor) -> Tensor:
    if scores.numel() == 0 or bool(torch.isnan(scores).any()):
        return torch.tensor(float("nan"), dtype=torch.float64, device=scores.device)
    rank = max(1, round(QUANTILE * scores.numel()))
    return scores.kthvalue(rank).values
