"""Participation ratio of the covariance spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._spectrum import singular_values


def _participation_ratio_compute(sigma: Tensor) -> Tensor:
    squares = sigma.square()
    total = squares.sum()
    return torch.where(total == 0, 0.0, total.square() / squares.square().sum())


def participation_ratio(
    features: Tensor, center: bool = True, mask: Tensor | None = None, strict: bool = False
) -> Tensor:
    r"""Participation ratio, ``(Σ λ)² / Σ λ²`` with ``λ = σ²``, the covariance's eigenvalues up to a factor.

    Gao et al. 2017, "A theory of multineuronal dimensionality" (bioRxiv 214262); centred, as a covariance is.

    Args:
        features: ``[..., d]``, any floating dtype; all leading dimensions are rows. Leave out padding and
            attention sinks with ``mask``: eight sink rows in two thousand can cut the figure to a tenth.
        center: subtract the mean row first. Centred and uncentred differ widely on transformers: say which.
        mask: ``[...]`` bool, the rows to use; all by default.
        strict: raise where there are fewer rows than features, instead of warning. The sample then limits the
            rank, not the network.

    Returns:
        float64 scalar; 0 for features that are all zero. Evaluated through the Gram matrix in float64.

    Raises:
        TypeError: features that are not floating, a floating mask.
        ValueError: features without rows, an empty mask, NaN or inf, or too few rows where ``strict``.

    >>> participation_ratio(torch.eye(3), center=False)
    tensor(3., dtype=torch.float64)
    """
    return _participation_ratio_compute(singular_values(features, mask, center, strict))
