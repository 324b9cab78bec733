"""How far two models' next-token entropies are apart on the same positions."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.functional._checks import check_logits
from lightning_rejuv.functional._positions import Reduction, reduce, sum_and_count
from lightning_rejuv.functional.token_entropy import _token_entropy_check
from lightning_rejuv.ops import token_stats


def _entropy_gap_check(logits: Tensor, base_logits: Tensor, mask: Tensor | None, temperature: float) -> None:
    _token_entropy_check(logits, mask, temperature)
    _token_entropy_check(base_logits, mask, temperature)
    if logits.shape[:-1] != base_logits.shape[:-1]:
        raise ValueError(
            "Expected arguments `logits` and `base_logits` to have the same positions "
            f"but got {tuple(logits.shape)} and {tuple(base_logits.shape)}."
        )


def _entropy_gaps(logits: Tensor, base_logits: Tensor, temperature: float) -> Tensor:
    entropy = token_stats(logits, temperature=temperature).entropy
    return (entropy - token_stats(base_logits, temperature=temperature).entropy).abs()


def _entropy_gap_update(
    logits: Tensor, base_logits: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    return sum_and_count(_entropy_gaps(logits, base_logits, temperature), mask)


def entropy_gap(
    logits: Tensor,
    base_logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Entropy gap to the base, ``|H(t) - H_base(t)|`` in nats, position by position.

    The score by which calibration positions are chosen in arXiv 2606.09932.

    Args:
        logits: ``[..., V]``, any floating dtype.
        base_logits: ``[..., V']``: the base's, at the same positions; the vocabulary may differ in size.
        mask: ``[...]`` bool, the positions to measure; all by default.
        temperature: the sampling temperature, of both.
        reduction: ``"mean"`` over tokens, or ``"none"`` for ``[...]`` with NaN where the mask is False.

    Returns:
        float64, nats, never negative. No gradient flows.

    Raises:
        TypeError: logits that are not floating, a mask that is.
        ValueError: different positions, temperature not positive, mask of another shape or empty, NaN or
            +inf logits.

    >>> import torch
    >>> entropy_gap(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, float("-inf")]]))
    tensor(0.6931, dtype=torch.float64)
    """
    _entropy_gap_check(logits, base_logits, mask, temperature)
    gaps = _entropy_gaps(logits, base_logits, temperature)
    check_logits("logits` and `base_logits", gaps, mask)
    return reduce(gaps, mask, reduction)
