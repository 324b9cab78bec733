"""Averages of a per-position value over the positions that a mask selects."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_choice, check_selects

Reduction = Literal["mean", "none"]
REDUCTIONS = ("mean", "none")


def sum_and_count(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum (float64) and number (int64) of the selected values; the others are not read, NaN or not."""
    if mask is None:
        return values.sum(dtype=torch.float64), values.new_full((), values.numel(), dtype=torch.int64)
    keep = mask.to(torch.bool)
    return torch.where(keep, values, 0).sum(dtype=torch.float64), keep.sum()


def reduce(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """Mean over the selected positions, or the values with NaN where the mask selects nothing.

    Raises:
        ValueError: an unknown ``reduction``, or no position selected.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    total, count = sum_and_count(values, mask)
    check_selects(mask, int(count))
    if reduction == "mean":
        return total / count
    return values if mask is None else values.masked_fill(~mask.to(torch.bool), float("nan"))
