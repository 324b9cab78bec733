"""Singular values of a feature matrix from its Gram matrix, which batches and processes can add up."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_floating, check_mask, check_selects

_ROWS_PER_CHUNK = 4096


def _spectrum_check(features: Tensor, mask: Tensor | None) -> None:
    check_floating("features", features)
    if features.ndim < 2 or features.shape[-1] == 0:
        raise ValueError(
            f"Expected argument `features` to be of shape [..., d] with rows but got {tuple(features.shape)}."
        )
    check_mask(mask, features.shape[:-1], "features")


def _spectrum_update(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix [d, d] and sum [d] of the selected rows, float64, and their number."""
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
            # Zeroed and not indexed, NaN included: an index by a mask would wait for the device.
            wide = torch.where(keep[start : start + _ROWS_PER_CHUNK], wide, 0.0)
        gram.addmm_(wide.T, wide)
        total += wide.sum(dim=0)
    count = total.new_full((), rows.shape[0], dtype=torch.int64) if keep is None else keep.sum()
    return gram, total, count


def _spectrum_compute(gram: Tensor, total: Tensor, count: Tensor, center: bool) -> Tensor:
    """Singular values [d] in descending order, float64; NaN where the features were not finite.

    What lies below the rounding error of the Gram matrix, 1e-8 of the largest times sqrt(d), is set to zero:
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
        TypeError: features that are not floating, a floating mask.
        ValueError: wrong rank, an empty mask, NaN or inf, or, where ``strict``, fewer rows than features.
    """
    _spectrum_check(features, mask)
    gram, total, count = _spectrum_update(features, mask)
    check_selects(mask, int(count))
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("Expected argument `features` to be finite but got NaN or inf in a selected row.")
    _check_rows(int(count), features.shape[-1], center, strict)
    return _spectrum_compute(gram, total, count, center)
