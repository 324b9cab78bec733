"""Distance of weights from the base's, relative to the base's norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_choice, check_floating, check_same_shape
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
    """Sums of squares (float64) of the difference and of the base."""
    if per == "tensor":
        return drift_sums(weight, base)
    drift = weight_drift(weight, base.to(weight.device))
    stats = drift.columns if per == "column" else drift.rows
    return stats.drift_square, stats.base_square


def _relative_drift_compute(difference: Tensor, base: Tensor) -> Tensor:
    # 0 / 0 is an unchanged zero tensor: no drift. x / 0 stays inf.
    ratio = torch.where((difference == 0) & (base == 0), 0.0, difference / base)
    return ratio.sqrt()


def relative_drift(weight: Tensor, base: Tensor, per: Per = "tensor") -> Tensor:
    r"""Relative L2 distance from the base, ``‖W - W_b‖₂ / ‖W_b‖₂``.

    Not ``|‖W‖ - ‖W_b‖| / ‖W_b‖``, which is nearly zero for any drift across the weights' own direction.

    Args:
        weight: any shape, any floating dtype.
        base: the base's tensor of the same shape; moved to the weight's device.
        per: one value for the whole tensor, for each ``"row"`` or for each ``"column"`` of a matrix.

    Returns:
        float64 scalar, ``[rows]`` or ``[columns]``. inf where only the base is zero.

    Raises:
        TypeError: not floating tensors.
        ValueError: shapes differ, or ``per`` asks for rows or columns of what is no matrix.

    >>> import torch
    >>> base = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> relative_drift(base + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), base, per="row")
    tensor([0., 1.], dtype=torch.float64)
    """
    _relative_drift_check(weight, base, per)
    return _relative_drift_compute(*_relative_drift_update(weight, base, per))
