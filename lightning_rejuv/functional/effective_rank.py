"""Effective rank of a feature matrix (Roy and Vetterli)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._spectrum import singular_values


def _effective_rank_compute(sigma: Tensor) -> Tensor:
    total = sigma.sum()
    share = torch.where(total == 0, 0.0, sigma / total)
    return torch.where(total == 0, 0.0, torch.special.entr(share).sum().exp())


def effective_rank(
    features: Tensor, center: bool = False, mask: Tensor | None = None, strict: bool = False
) -> Tensor:
    r"""Effective rank, ``exp(-Σ p_i ln p_i)`` with ``p_i = σ_i / Σ σ`` over the singular values σ.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007.

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

    >>> effective_rank(torch.eye(3))
    tensor(3.0000, dtype=torch.float64)
    """
    return _effective_rank_compute(singular_values(features, mask, center, strict))
