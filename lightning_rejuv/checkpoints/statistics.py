"""What is measured on the way: drift of a tensor from the base, and what rounding takes from its fusion."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rejuv.weights.edit import SAMPLED_ROWS, rounding_sums


@dataclass
class TensorStatistics:
    """Sums over the weights of one tensor, or of several.

    Attributes:
        difference: ‖w - b‖² in float64.
        base: ‖b‖².
        count: number of weights.
        sampled: number of weights in the rows that are compared one by one.
        changed: how many of them differ from the base.
        gap: how far from the exact fusion those rows lie, along the line from the SFT model to the base.
        line: its length squared; the two of :func:`lightning_rejuv.weights.edit.rounding_sums`.
    """

    difference: float = 0.0
    base: float = 0.0
    count: int = 0
    sampled: int = 0
    changed: int = 0
    gap: float = 0.0
    line: float = 0.0

    @property
    def drift(self) -> float:
        """Relative L2 distance ‖w - b‖ / ‖b‖; infinite where only the base is zero."""
        if self.base == 0.0:
            return math.inf if self.difference else 0.0
        return math.sqrt(self.difference / self.base)

    @property
    def changed_share(self) -> float:
        """Share of the weights that differ from the base; an estimate from every eighth row."""
        return self.changed / self.sampled if self.sampled else 0.0

    @property
    def rounding_shift(self) -> float:
        """By how much rounding shifts alpha, positive toward the SFT model; an estimate from every eighth row."""
        return self.gap / self.line if self.line else 0.0

    def add(self, sft: Tensor, base: Tensor) -> None:
        """Add rows in float32 or float64, before the fusion; whether weights differ is counted in every eighth."""
        difference = (sft - base).flatten()
        flat = base.flatten()
        self.difference += float(torch.dot(difference, difference))
        self.base += float(torch.dot(flat, flat))
        self.count += flat.numel()
        ours, theirs = sft[::SAMPLED_ROWS], base[::SAMPLED_ROWS]
        self.sampled += ours.numel()
        self.changed += int((ours != theirs).count_nonzero())

    def add_rounding(self, sft: Tensor, base: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Add rows before the fusion, and after it before and after rounding; every eighth row is looked at."""
        gap, line = rounding_sums(*(t[::SAMPLED_ROWS] for t in (sft, base, exact, rounded)))
        self.gap += gap
        self.line += line


def pooled(statistics: Iterable[TensorStatistics]) -> TensorStatistics:
    """Sum over tensors, as if they were one vector."""
    total = TensorStatistics()
    for one in statistics:
        for field in ("difference", "base", "count", "sampled", "changed", "gap", "line"):
            setattr(total, field, getattr(total, field) + getattr(one, field))
    return total
