"""The result of an attribution: how much every neuron contributes, over all positions together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_rejuv.config import RankBy


@dataclass
class Attribution:
    """Contributions of every neuron to a quantity: the target logits, the entropy, or a loss.

    Attributes:
        total: for each neuron group [count] float64, the sum of its contributions, in the unit of the quantity.
        absolute: for each group [count] float64, the sum of their absolute values: of those to each position, or, for
            the entropy and a loss, of those to each batch of the caller's.
        union: for each group [count] bool, the neurons that are among the ``top`` of any position.
        top: how many neurons of each position join the union; 0 for none.
        positions: how many positions were seen.
        error: largest |reconstructed - actual| logit over the positions, divided by max(1, |actual|).
        ranking: how neurons are ranked unless the caller says otherwise: ``"absolute"`` or ``"signed"``.
        reconstructs: whether the contributions add up to the quantity, so that ``error`` means something.
    """

    total: list[Tensor] = field(default_factory=list)
    absolute: list[Tensor] = field(default_factory=list)
    union: list[Tensor] = field(default_factory=list)
    top: int = 0
    positions: int = 0
    error: float = 0.0
    ranking: RankBy = "absolute"
    reconstructs: bool = False

    def add(self, contributions: list[Tensor], error: Tensor) -> None:
        """Add contributions [P, count] of some positions, and their reconstruction errors [P]."""
        if not self.total:
            self.total = [torch.zeros_like(c[0], dtype=torch.float64) for c in contributions]
            self.absolute = [torch.zeros_like(c[0], dtype=torch.float64) for c in contributions]
            self.union = [torch.zeros_like(c[0], dtype=torch.bool) for c in contributions]
        if self.top:
            best = torch.cat(contributions, dim=1).abs().topk(self.top, dim=1).indices
            joined = torch.cat(self.union).index_fill(0, best.flatten().unique(), True)
            self.union = list(joined.split([len(mask) for mask in self.union]))
        for total, absolute, c in zip(self.total, self.absolute, contributions, strict=True):
            total += c.sum(0, dtype=torch.float64)
            absolute += c.abs().sum(0, dtype=torch.float64)
        self.positions += len(error)
        self.error = max(self.error, float(error.max()))
