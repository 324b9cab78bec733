"""Drift of a weight matrix from its base, of rows and columns in one read of both matrices (op C)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_rejuv.ops._inputs import accumulator_dtype, check_device, check_floating, check_plain
from lightning_rejuv.ops._library import registered


class DriftStats(NamedTuple):
    """Squared norms and the largest change, one entry for each row (or each column) of the matrix."""

    drift_square: Tensor
    weight_square: Tensor
    base_square: Tensor
    drift_max: Tensor


class WeightDrift(NamedTuple):
    """`DriftStats` of the rows, each ``[R]``, and of the columns, each ``[C]``."""

    rows: DriftStats
    columns: DriftStats


def weight_drift(weight: Tensor, base: Tensor) -> WeightDrift:
    """Return ‖w−b‖², ‖w‖², ‖b‖² and max|w−b| of each row and each column.

    One read of both matrices, no temporary of their size, no gradient. The inner product follows as
    ⟨w, b⟩ = (‖w‖² + ‖b‖² − ‖w−b‖²) / 2. The formula is ``ops.reference.weight_drift``.

    Args:
        weight: ``[R, C]``, any floating point dtype and strides.
        base: ``[R, C]`` on the same device; its dtype may differ.

    Returns:
        Row and column statistics in float64 (float32 on devices without it).

    Raises:
        TypeError: If an argument is not of a floating point dtype, or a DTensor.
        ValueError: If an argument is not a matrix, or shapes or devices differ.

    Example:
        >>> import torch
        >>> from lightning_rejuv import ops
        >>> drift = ops.weight_drift(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2))
        >>> drift.rows.drift_square.tolist(), drift.columns.drift_max.tolist()
        ([9.0, 1.0], [3.0, 1.0])
    """
    check_plain(weight=weight, base=base)
    check_floating(weight=weight, base=base)
    if weight.dim() != 2:
        raise ValueError(
            f"Expected argument `weight` to be a matrix [R, C] but got shape {tuple(weight.shape)}. Pass a "
            "vector as `weight[:, None]` and a convolution kernel as `weight.flatten(1)`, the base likewise."
        )
    if weight.shape != base.shape:
        raise ValueError(
            f"Expected argument `base` to have the shape of `weight` {tuple(weight.shape)} but got "
            f"{tuple(base.shape)}."
        )
    check_device("base", base, "weight", weight)
    if weight.numel() == 0:
        empty = weight.new_zeros((4, sum(weight.shape)), dtype=accumulator_dtype(weight.device))
        rows, columns = empty.split(list(weight.shape), dim=1)
    else:
        rows, columns = registered.weight_drift.default(weight.detach(), base.detach())
    return WeightDrift(DriftStats(*rows.unbind(0)), DriftStats(*columns.unbind(0)))
