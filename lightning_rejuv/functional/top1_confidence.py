"""Probability of the most likely next token."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.functional._checks import check_logits
from lightning_rejuv.functional._positions import Reduction, reduce, sum_and_count
from lightning_rejuv.functional.token_entropy import _token_entropy_check
from lightning_rejuv.ops import token_stats


def _top1_confidence_update(logits: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    return sum_and_count(token_stats(logits, temperature=temperature).top1_prob, mask)


def top1_confidence(
    logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    r"""Probability of the most likely token, ``max_v p_v = 1 / Σ_v e^{(x_v - max x) / T}``.

    Args:
        logits: ``[..., V]``, any floating dtype; -inf for masked-out tokens.
        mask: ``[...]`` bool, the positions to measure; all by default.
        temperature: the sampling temperature T.
        reduction: ``"mean"`` over tokens, or ``"none"`` for ``[...]`` with NaN where the mask is False.

    Returns:
        float64, in (0, 1]. No gradient flows.

    Raises:
        TypeError: logits that are not floating, a mask that is.
        ValueError: temperature not positive, mask of another shape or empty, NaN or +inf logits.

    >>> import torch
    >>> top1_confidence(torch.tensor([[0.0, 3.0]]).log())
    tensor(1., dtype=torch.float64)
    """
    _token_entropy_check(logits, mask, temperature)
    confidence = token_stats(logits, temperature=temperature).top1_prob
    check_logits("logits", confidence, mask)
    return reduce(confidence, mask, reduction)
