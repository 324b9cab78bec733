"""Which response positions the attribution looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rejuv.attribution.confidence import Confidence
from lightning_rejuv.config import PositionRule

# A position counts as sharpened where the base already gave the target token at least this probability:
# SFT taught nothing new there, it only took the alternatives away. Any other position counts as learned if the
# SFT model gives the target more than LEARNED.
SHARPENED, LEARNED = 0.25, 0.5


@dataclass(frozen=True)
class Positions:
    """The selected positions of one batch, at most N a response.

    Attributes:
        row: [P] int64, which response.
        time: [P] int64, the position whose logits predict the target.
        rank: [P] int64, 0 for the first choice of its response, 1 for the second, …
        sharpened: how many of them are sharpened.
        learned: how many of them are learned.
    """

    row: Tensor
    time: Tensor
    rank: Tensor
    sharpened: int
    learned: int

    def __len__(self) -> int:
        return len(self.row)

    def mask(self, tokens: Tensor) -> Tensor:
        """[B, T] bool, where they are among the batch's tokens [B, T]."""
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[self.row, self.time] = True
        return mask


def select_positions(
    sft: Confidence, base: Confidence, response: Tensor, rule: PositionRule, count: int = 1
) -> Positions:
    """Choose the positions at which neurons are held responsible for over-confidence.

    ``"entropy_gap"`` takes the largest |H_sft - H_base| of each response (Liu et al. 2026, arXiv
    2606.09932). Those are often the places where SFT taught something *new*; a reset of their neurons
    un-teaches it. ``"sharpened"`` takes the largest positive H_base - H_sft among the positions where the
    base already gave the target p >= 0.25; a response without such a position contributes none.

    Args:
        sft: confidence of the SFT model.
        base: confidence of the anchor on the same batch.
        response: [B, T - 1] bool, where the response is.
        rule: which positions are chosen.
        count: the most positions a response contributes.

    >>> sft = Confidence(torch.tensor([[0.0, 0.1, 0.0]]), torch.tensor([[1.0, 0.9, 1.0]]).log())
    >>> base = Confidence(torch.tensor([[2.0, 0.9, 0.3]]), torch.tensor([[0.01, 0.6, 0.9]]).log())
    >>> everywhere = torch.ones(1, 3, dtype=torch.bool)
    >>> select_positions(sft, base, everywhere, "entropy_gap").time  # what SFT taught
    tensor([0])
    >>> select_positions(sft, base, everywhere, "sharpened").time  # what SFT narrowed
    tensor([1])
    """
    gap = base.entropy - sft.entropy
    known = base.log_prob >= math.log(SHARPENED)
    sharpened = response & known & (gap > 0)
    learned = response & ~known & (sft.log_prob > math.log(LEARNED))
    eligible, score = (sharpened, gap) if rule == "sharpened" else (response, gap.abs())
    best = score.masked_fill(~eligible, -torch.inf).topk(min(count, score.shape[1]), dim=1)
    row, rank = (best.values > -torch.inf).nonzero(as_tuple=True)
    time = best.indices[row, rank]
    return Positions(row, time, rank, int(sharpened[row, time].sum()), int(learned[row, time].sum()))
