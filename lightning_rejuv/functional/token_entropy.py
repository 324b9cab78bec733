"""Entropy of the next-token distribution."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.functional._checks import check_floating, check_logits, check_mask, check_positive
from lightning_rejuv.functional._positions import Reduction, reduce, sum_and_count
from lightning_rejuv.ops import token_stats


def _token_entropy_check(logits: Tensor, mask: Tensor | None, temperature: float) -> None:
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

    Evaluated as ``ln d - s / d`` with ``z = (x - max x) / T``, ``d = Σ e^z``, ``s = Σ z e^z``, in one read of
    the logits and float32 or better, which stays exact at the entropies of an over-trained model (0.02
    nats and less), where bfloat16 arithmetic is off by tens of per cent. The pre-RL indicator of arXiv
    2606.09932 and 2606.18487.

    Args:
        logits: ``[..., V]``, any floating dtype; -inf for masked-out tokens.
        mask: ``[...]`` bool, the positions to measure (:func:`response_mask`); all by default.
        temperature: the sampling temperature T.
        reduction: ``"mean"`` over tokens (not over sequences), or ``"none"`` for ``[...]`` with NaN where
            the mask is False.

    Returns:
        float64, nats. No gradient flows.

    Raises:
        TypeError: logits that are not floating, a mask that is.
        ValueError: temperature not positive, mask of another shape or empty, NaN or +inf logits.

    >>> import torch
    >>> token_entropy(torch.zeros(2, 3, 4))
    tensor(1.3863, dtype=torch.float64)
    """
    _token_entropy_check(logits, mask, temperature)
    entropy = token_stats(logits, temperature=temperature).entropy
    check_logits("logits", entropy, mask)
    return reduce(entropy, mask, reduction)
