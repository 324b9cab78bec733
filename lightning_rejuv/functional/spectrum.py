"""Ranks of a feature matrix, from the singular values of its Gram matrix, which batches and processes can add up."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_floating, check_fraction, check_mask, check_selects

_ROWS_PER_CHUNK = 4096


def _spectrum_check(features: Tensor, mask: Tensor | None) -> None:
    check_floating("features", features)
    if features.ndim < 2 or features.shape[-1] == 0:
        raise ValueError(
            f"Expected argument `features` to be of shape [..., d] with rows but got {tuple(features.shape)}."
        )
    check_mask(mask, features.shape[:-1], "features")


def _spectrum_update(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Gram matrix [d, d] and the sum [d] of the selected rows, float64, and their number."""
    rows = features.detach().reshape(-1, features.shape[-1])
    keep = None if mask is None else mask.reshape(-1, 1).to(torch.bool)
    if keep is not None and rows.device.type == "cpu":
        rows, keep = rows[keep[:, 0]], None
    width = rows.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    total = torch.zeros(width, dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[0], _ROWS_PER_CHUNK):
        wide = rows[start : start + _ROWS_PER_CHUNK].to(torch.float64)
        if keep is not None:
            # Rows are zeroed, NaN included, and not indexed: an index by a mask would wait for the device.
            wide = torch.where(keep[start : start + _ROWS_PER_CHUNK], wide, 0.0)
        gram.addmm_(wide.T, wide)
        total += wide.sum(dim=0)
    count = total.new_full((), rows.shape[0], dtype=torch.int64) if keep is None else keep.sum()
    return gram, total, count


def _spectrum_compute(gram: Tensor, total: Tensor, count: Tensor, center: bool) -> Tensor:
    """Return the singular values [d] in descending order, float64; NaN if the features were not finite.

    What lies below the rounding error of the Gram matrix, 1.5e-8 of ``‖Φ‖_F`` times sqrt(d), is set to zero:
    otherwise a rank-deficient matrix would get a tail of noise.
    """
    if center:
        gram = gram - torch.outer(total, total) / count
    if not bool(torch.isfinite(gram).all()):
        return torch.full_like(total, float("nan"))
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
    floor = torch.finfo(torch.float64).eps * len(squares) * gram.diagonal().sum()
    return torch.where(squares > floor, squares, 0.0).sqrt()


def _check_rows(count: int, width: int, center: bool, strict: bool) -> None:
    ceiling = count - 1 if center else count
    if ceiling >= width:
        return
    message = (
        f"Expected at least as many rows as features but got {count} rows of {width} features: no rank above "
        f"{ceiling} can be seen, whatever the network does. Measure on more tokens."
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def singular_values(features: Tensor, mask: Tensor | None, center: bool, strict: bool) -> Tensor:
    """Check features and return their singular values [d] in descending order, float64.

    Raises:
        TypeError: the features are not floating, or the mask is.
        ValueError: the features have no rows, the mask has another shape or selects none, selected rows hold NaN or
            inf, or, if ``strict``, there are fewer rows than features.
    """
    _spectrum_check(features, mask)
    gram, total, count = _spectrum_update(features, mask)
    check_selects(mask, int(count))
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("Expected argument `features` to be finite but got NaN or inf in a selected row.")
    _check_rows(int(count), features.shape[-1], center, strict)
    return _spectrum_compute(gram, total, count, center)


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
        strict: raise if there are fewer rows than features, instead of warning. The sample then limits the
            rank, not the network.

    Returns:
        float64 scalar; 0 for features that are all zero. It is evaluated through the Gram matrix in float64.

    Raises:
        TypeError: the features are not floating, or the mask is.
        ValueError: the features have no rows, the mask selects none, selected rows hold NaN or inf, or, if
            ``strict``, there are too few rows.

    >>> effective_rank(torch.eye(3))
    tensor(3.0000, dtype=torch.float64)
    """
    return _effective_rank_compute(singular_values(features, mask, center, strict))


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
        strict: raise if there are fewer rows than features, instead of warning. The sample then limits the
            rank, not the network.

    Returns:
        float64 scalar; 0 for features that are all zero. It is evaluated through the Gram matrix in float64.

    Raises:
        TypeError: the features are not floating, or the mask is.
        ValueError: the features have no rows, the mask selects none, selected rows hold NaN or inf, or, if
            ``strict``, there are too few rows.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0])))
    tensor(1.2500, dtype=torch.float64)
    """
    return _stable_rank_compute(singular_values(features, mask, center, strict))


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

    srank_δ of Kumar et al. 2021 (arXiv 2010.14498), who take δ = 0.01.

    Args:
        features: ``[..., d]``, any floating dtype; all leading dimensions are rows. Leave out padding and
            attention sinks with ``mask``: eight sink rows in two thousand can cut the figure to a tenth.
        delta: the share of the singular values' sum that may be left out.
        center: subtract the mean row first. Centred and uncentred differ widely on transformers: say which.
        mask: ``[...]`` bool, the rows to use; all by default.
        strict: raise if there are fewer rows than features, instead of warning. The sample then limits the
            rank, not the network.

    Returns:
        float64 scalar; 0 for features that are all zero. It is evaluated through the Gram matrix in float64.

    Raises:
        TypeError: the features are not floating, or the mask is.
        ValueError: ``delta`` lies outside [0, 1], the features have no rows, the mask selects none, selected rows
            hold NaN or inf, or, if ``strict``, there are too few rows.

    >>> srank(torch.diag(torch.tensor([1.0, 1.0, 1e-4])), delta=0.01)
    tensor(2., dtype=torch.float64)
    """
    check_fraction("delta", delta)
    return _srank_compute(singular_values(features, mask, center, strict), delta)
