"""Share of weights that have not moved from the base."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional.relative_drift import _relative_drift_check
from lightning_rejuv.ops.drift_sums import blocked_sums


def _tolerance_check(tolerance: float) -> None:
    if not isinstance(tolerance, (int, float)) or not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"Expected argument `tolerance` to be a float >= 0 but got {tolerance!r}.")


def _drift_sparsity_update(weight: Tensor, base: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Number of unmoved weights and of all weights."""
    unmoved = blocked_sums(weight, base, tolerance)[2]
    return unmoved, torch.full((), weight.numel(), device=weight.device)


def drift_sparsity(weight: Tensor, base: Tensor, tolerance: float = 0.0) -> Tensor:
    r"""Fraction of coordinates with ``|W - W_b| <= tolerance``: 1 means untouched.

    Over-trained models drift in few coordinates (arXiv 2606.09932). In bfloat16 small updates are
    rounded away, so that a high figure may be the dtype's.

    Args:
        weight: any shape, any floating dtype.
        base: the base's tensor of the same shape; moved to the weight's device.
        tolerance: the largest absolute change that counts as none.

    Returns:
        float64 scalar in [0, 1]; NaN for empty tensors.

    Raises:
        TypeError: not floating tensors.
        ValueError: shapes differ, or the tolerance is negative.

    >>> drift_sparsity(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    tensor(0.5000, dtype=torch.float64)
    """
    _relative_drift_check(weight, base, "tensor")
    _tolerance_check(tolerance)
    unmoved, count = _drift_sparsity_update(weight, base, tolerance)
    return unmoved.double() / count
