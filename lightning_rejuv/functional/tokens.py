"""Measures of next-token distributions and of responses' likelihoods, and the positions that they are taken at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import (
    check_choice,
    check_floating,
    check_logits,
    check_mask,
    check_positive,
    check_same_shape,
    check_selects,
)
from lightning_rejuv.ops import token_stats

Reduction = Literal["mean", "none"]
REDUCTIONS = ("mean", "none")


def response_mask(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mark the positions whose logits predict a labelled token.

    The logits at position t predict the token at t + 1, so that the mask is that of the labels, shifted by one; the
    last position predicts nothing.

    Args:
        labels: ``[B, T]`` int64, aligned with the input ids, ``ignore_index`` outside the response.
        ignore_index: the label of what is not part of the response.

    Returns:
        ``[B, T]`` bool.

    Raises:
        TypeError: ``labels`` is not an integer tensor.
        ValueError: ``labels`` is not of rank 2.

    >>> response_mask(torch.tensor([[-100, -100, 5, 6]]))
    tensor([[False,  True,  True, False]])
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"Expected argument `labels` to be an integer tensor but got {got}.")
    if labels.ndim != 2:
        raise ValueError(f"Expected argument `labels` to be of shape [B, T] but got {tuple(labels.shape)}.")
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != ignore_index
    return mask


def sum_and_count(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum (float64) and the number (int64) of the selected values; the others may be NaN."""
    if mask is None:
        return values.sum(dtype=torch.float64), values.new_full((), values.numel(), dtype=torch.int64)
    keep = mask.to(torch.bool)
    return torch.where(keep, values, 0).sum(dtype=torch.float64), keep.sum()


def reduce(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """Return the mean over the selected positions, or the values, with NaN at the other positions.

    Raises:
        ValueError: ``reduction`` is unknown, or no position is selected.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    total, count = sum_and_count(values, mask)
    check_selects(mask, int(count))
    if reduction == "mean":
        return total / count
    return values if mask is None else values.masked_fill(~mask.to(torch.bool), float("nan"))


def _logits_check(logits: Tensor, mask: Tensor | None, temperature: float) -> None:
    check_positive("temperature", temperature)
    check_floating("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"Expected argument `logits` to be of shape [..., V] but got {tuple(logits.shape)}.")
    check_mask(mask, logits.shape[:-1], "logits")


def _token_entropy_update(logits: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    return sum_and_count(token_stats(logits, temperature=temperature).entropy, mask)


def token_entropy(
    logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    r"""Entropy of the next-token distribution, in nats: ``H(t) = -Σ_v p_v ln p_v``, ``p = softmax(x / T)``.

    It is evaluated as ``ln d - s / d`` with ``z = (x - max x) / T``, ``d = Σ e^z``, ``s = Σ z e^z``, in one read of
    the logits and in float32 or better. That stays exact at the entropies of an over-trained model (0.02
    nats and less), where bfloat16 arithmetic is off by tens of per cent. It is the pre-RL indicator of arXiv
    2606.09932 and 2606.18487.

    Args:
        logits: ``[..., V]``, any floating dtype; -inf for masked-out tokens.
        mask: ``[...]`` bool, the positions to measure (:func:`response_mask`); all by default.
        temperature: the sampling temperature T.
        reduction: ``"mean"`` over tokens (not over sequences), or ``"none"`` for ``[...]`` with NaN at the
            positions that the mask leaves out.

    Returns:
        float64, nats. No gradient flows.

    Raises:
        TypeError: the logits are not floating, or the mask is.
        ValueError: the temperature is not positive, the mask has another shape or selects nothing, or logits are NaN
            or +inf.

    >>> token_entropy(torch.zeros(2, 3, 4))
    tensor(1.3863, dtype=torch.float64)
    """
    _logits_check(logits, mask, temperature)
    entropy = token_stats(logits, temperature=temperature).entropy
    check_logits("logits", entropy, mask)
    return reduce(entropy, mask, reduction)


def _top1_confidence_update(logits: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    return sum_and_count(token_stats(logits, temperature=temperature).top1_prob, mask)


def top1_confidence(
    logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    r"""Probability of the most likely next token, ``max_v p_v = 1 / Σ_v e^{(x_v - max x) / T}``.

    Args:
        logits: ``[..., V]``, any floating dtype; -inf for masked-out tokens.
        mask: ``[...]`` bool, the positions to measure; all by default.
        temperature: the sampling temperature T.
        reduction: ``"mean"`` over tokens, or ``"none"`` for ``[...]`` with NaN at the positions that the mask
            leaves out.

    Returns:
        float64, in (0, 1]. No gradient flows.

    Raises:
        TypeError: the logits are not floating, or the mask is.
        ValueError: the temperature is not positive, the mask has another shape or selects nothing, or logits are NaN
            or +inf.

    >>> top1_confidence(torch.tensor([[0.0, 3.0]]).log())
    tensor(1., dtype=torch.float64)
    """
    _logits_check(logits, mask, temperature)
    confidence = token_stats(logits, temperature=temperature).top1_prob
    check_logits("logits", confidence, mask)
    return reduce(confidence, mask, reduction)


def _entropy_gap_check(logits: Tensor, base_logits: Tensor, mask: Tensor | None, temperature: float) -> None:
    _logits_check(logits, mask, temperature)
    _logits_check(base_logits, mask, temperature)
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

    It is the score by which arXiv 2606.09932 chooses calibration positions.

    Args:
        logits: ``[..., V]``, any floating dtype.
        base_logits: ``[..., V']``, those of the base at the same positions; its vocabulary may have another size.
        mask: ``[...]`` bool, the positions to measure; all by default.
        temperature: the sampling temperature of both models.
        reduction: ``"mean"`` over tokens, or ``"none"`` for ``[...]`` with NaN at the positions that the mask
            leaves out.

    Returns:
        float64, nats, never negative. No gradient flows.

    Raises:
        TypeError: the logits are not floating, or the mask is.
        ValueError: the positions differ, the temperature is not positive, the mask has another shape or selects
            nothing, or logits are NaN or +inf.

    >>> entropy_gap(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, float("-inf")]]))
    tensor(0.6931, dtype=torch.float64)
    """
    _entropy_gap_check(logits, base_logits, mask, temperature)
    gaps = _entropy_gaps(logits, base_logits, temperature)
    check_logits("logits` and `base_logits", gaps, mask)
    return reduce(gaps, mask, reduction)


def _support_retention_check(logprobs: Tensor, base_logprobs: Tensor, mask: Tensor | None) -> None:
    check_floating("logprobs", logprobs, ndim=2)
    check_floating("base_logprobs", base_logprobs, ndim=2)
    check_same_shape("logprobs", logprobs, "base_logprobs", base_logprobs)
    if mask is not None and mask.shape != logprobs.shape:
        raise ValueError(
            f"Expected argument `mask` to have the shape {tuple(logprobs.shape)} but got {tuple(mask.shape)}."
        )


def _support_retention_update(
    logprobs: Tensor, base_logprobs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the sum over responses of their log-likelihood ratio, float64, and the number of responses."""
    ratio = logprobs.detach().double() - base_logprobs.detach().double()
    if mask is None:
        return ratio.sum(), torch.full((), ratio.shape[0], device=ratio.device)
    keep = mask.to(torch.bool)
    return torch.where(keep, ratio, 0.0).sum(), keep.any(dim=1).sum()


def support_retention(logprobs: Tensor, base_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean log-likelihood ratio on the base's own responses, ``E_y[ln p(y) - ln p_base(y)]``.

    With responses y sampled from the base it is ``-KL(p_base ‖ p)``: 0 if nothing is lost, and the more
    negative the fewer of the base's ways are left for RL to find. Sample on held-out prompts and, if you can verify
    responses, keep the correct ones. On SFT demonstrations it means something else: it rises on them.

    Args:
        logprobs: ``[B, T]``, the model's log-probabilities of the responses' tokens.
        base_logprobs: ``[B, T]``, those of the base.
        mask: ``[B, T]`` bool, the responses' tokens; all by default. A row without any is left out.

    Returns:
        float64 scalar, nats per response.

    Raises:
        TypeError: log-probabilities are not floating.
        ValueError: they have another rank or differ in shape, no token is selected, or a selected one is NaN.

    >>> support_retention(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-1.0, -1.0]]))
    tensor(-2., dtype=torch.float64)
    """
    _support_retention_check(logprobs, base_logprobs, mask)
    total, count = _support_retention_update(logprobs, base_logprobs, mask)
    if int(count) == 0:
        raise ValueError("Expected at least one response token to measure but the mask selects none.")
    if bool(torch.isnan(total)):
        raise ValueError("Expected log-probabilities that are not NaN at the selected tokens but got NaN.")
    return total / count
