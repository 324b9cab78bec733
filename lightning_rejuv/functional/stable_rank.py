"""Stable rank of a feature matrix (Rudelson and Vershynin)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._spectrum import singular_values


def _stable_rank_compute(sigma: Tensor) -> Tensor:
    squares = sigma.square()
    return torch.where(squares[0] == 0, 0.0, squares.sum() / squares[0])


def stable_rank(
    features: Tensor, center: bool = False, mask: Tensor | None = None, strict: bool = False
) -> Tensor:
    r"""Stable rank, ``‖Φ‖²_F / ‖Φ‖²_2 = Σ σ² / σ_1²``.

    Rudelson and Vershynin, "Sampling from large matrices", 2007 (arXiv math/0503442). Some libraries call
    :func:`srank` by this name; that is another quantity.

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

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0])))
    tensor(1.2500, dtype=torch.float64)
    """
    return _stable_rank_compute(singular_values(features, mask, center, strict))
