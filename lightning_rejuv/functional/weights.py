"""Distances between weights: from the base's, and from those of one optimizer step before."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import (
    check_choice,
    check_floating,
    check_not_negative,
    check_same_shape,
)
from lightning_rejuv.ops import weight_drift
from lightning_rejuv.ops.drift_sums import drift_sums

Per = Literal["tensor", "row", "column"]


def _relative_drift_check(weight: Tensor, base: Tensor, per: str) -> None:
    check_choice("per", per, ("tensor", "row", "column"))
    check_floating("weight", weight)
    check_floating("base", base)
    check_same_shape("weight", weight, "base", base)
    if per != "tensor" and weight.ndim != 2:
        raise ValueError(f"Expected a matrix for `per={per!r}` but got the shape {tuple(weight.shape)}.")


def _relative_drift_update(weight: Tensor, base: Tensor, per: str = "tensor") -> tuple[Tensor, Tensor]:
    """Return the sums of squares (float64) of the difference and of the base."""
    if per == "tensor":
        difference, of_base, _ = drift_sums(weight, base)
        return difference, of_base
    drift = weight_drift(weight, base.to(weight.device))
    stats = drift.columns if per == "column" else drift.rows
    return stats.drift_square, stats.base_square


def _relative_drift_compute(difference: Tensor, base: Tensor) -> Tensor:
    # 0 / 0 is an unchanged zero tensor: no drift. x / 0 stays inf.
    ratio = torch.where((difference == 0) & (base == 0), 0.0, difference / base)
    return ratio.sqrt()


def relative_drift(weight: Tensor, base: Tensor, per: Per = "tensor") -> Tensor:
    r"""Relative L2 distance from the base, ``‖W - W_b‖₂ / ‖W_b‖₂``.

    It is not ``|‖W‖ - ‖W_b‖| / ‖W_b‖``, which is nearly zero for any drift across the weights' own direction.

    Args:
        weight: any shape, any floating dtype.
        base: the base's tensor of the same shape; moved to the weight's device.
        per: one value for the whole tensor, for each ``"row"`` or for each ``"column"`` of a matrix.

    Returns:
        float64 scalar, ``[rows]`` or ``[columns]``; inf if only the base is zero.

    Raises:
        TypeError: the tensors are not floating.
        ValueError: their shapes differ, or ``per`` asks for rows or columns of what is no matrix.

    >>> base = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> relative_drift(base + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), base, per="row")
    tensor([0., 1.], dtype=torch.float64)
    """
    _relative_drift_check(weight, base, per)
    return _relative_drift_compute(*_relative_drift_update(weight, base, per))


def update_ratio(weight: Tensor, previous: Tensor) -> Tensor:
    r"""Relative size of an update, ``‖W_t - W_{t-1}‖₂ / ‖W_{t-1}‖₂``: the drift since one step before.

    In RL an over-trained model has the *larger* gradient norm and the *smaller* update (arXiv 2606.09932), so
    that the gradient norm alone misleads.

    Args:
        weight: any shape, any floating dtype, after the step.
        previous: a copy from before the step, of the same shape.

    Returns:
        float64 scalar; inf if only the previous weight is zero.

    Raises:
        TypeError: the tensors are not floating.
        ValueError: their shapes differ.

    >>> update_ratio(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0]))
    tensor(0.2000, dtype=torch.float64)
    """
    return relative_drift(weight, previous)


def _drift_sparsity_update(weight: Tensor, base: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the number of unmoved weights and of all weights."""
    unmoved = drift_sums(weight, base, tolerance)[2].to(torch.int64)
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
        TypeError: the tensors are not floating.
        ValueError: their shapes differ, or the tolerance is negative.

    >>> drift_sparsity(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    tensor(0.5000, dtype=torch.float64)
    """
    _relative_drift_check(weight, base, "tensor")
    check_not_negative("tolerance", tolerance)
    unmoved, count = _drift_sparsity_update(weight, base, tolerance)
    return unmoved.double() / count
