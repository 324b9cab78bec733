"""Number of singular values that hold a given share of their sum (Kumar et al.)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_fraction
from lightning_rejuv.functional._spectrum import singular_values


def _srank_compute(sigma: Tensor, delta: float) -> Tensor:
    cumulative = sigma.cumsum(0)
    rank = (cumulative < (1.0 - delta) * cumulative[-1]).sum() + 1
    return torch.where(sigma[0] > 0, rank, torch.where(torch.isnan(sigma[0]), sigma[0], 0.0)).to(
        torch.float64
    )


def srank(
    features: Tensor,
    delta: float = 0.01,
    center: bool = False,
    mask: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    r"""Smallest k with ``Σ_{i≤k} σ_i ≥ (1 - δ) Σ σ_i``.

    srank_δ of Kumar et al. 2021 (arXiv 2010.14498), δ = 0.01 there.

    Args:
        features: ``[..., d]``, any floating dtype; all leading dimensions are rows. Leave out padding and
            attention sinks with ``mask``: eight sink rows in two thousand can cut the figure to a tenth.
        delta: the share of the singular values' sum that may be left out.
        center: subtract the mean row first. Centred and uncentred differ widely on transformers: say which.
        mask: ``[...]`` bool, the rows to use; all by default.
        strict: raise where there are fewer rows than features, instead of warning. The sample then limits the
            rank, not the network.

    Returns:
        float64 scalar; 0 for features that are all zero. Evaluated through the Gram matrix in float64.

    Raises:
        TypeError: features that are not floating, a floating mask.
        ValueError: features without rows, an empty mask, NaN or inf, or too few rows where ``strict``.

    >>> srank(torch.diag(torch.tensor([1.0, 1.0, 1e-4])), delta=0.01)
    tensor(2., dtype=torch.float64)
    """
    check_fraction("delta", delta)
    return _srank_compute(singular_values(features, mask, center, strict), delta)
