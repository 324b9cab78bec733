"""Entropy of attention distributions, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_floating, check_mask, check_selects


def _attention_entropy_check(attention: Tensor, mask: Tensor | None) -> None:
    check_floating("attention", attention, ndim=4)
    check_mask(mask, torch.Size((attention.shape[0], attention.shape[2])), "attention, its heads and keys")


def _attention_entropy_update(attention: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the entropies [H] over the selected queries, float64, and the number of queries."""
    dtype = torch.promote_types(attention.dtype, torch.float32)
    entropy = torch.special.entr(attention.detach().to(dtype)).sum(dim=-1, dtype=torch.float64)
    if mask is None:
        return entropy.sum(dim=(0, 2)), torch.full((), entropy[:, 0].numel(), device=entropy.device)
    keep = mask.to(torch.bool)
    return torch.where(keep[:, None], entropy, 0.0).sum(dim=(0, 2)), keep.sum()


def attention_entropy(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean entropy of each head's attention, ``-Σ_j a_ij ln a_ij`` in nats, over the queries i.

    Zhai et al. 2023 (arXiv 2303.06296): entropy collapse goes with unstable training. Its ceiling
    is the logarithm of how many keys a query sees, so compare equal positions only.

    Args:
        attention: ``[B, H, Q, K]`` probabilities (``output_attentions=True``), any floating dtype.
        mask: ``[B, Q]`` bool, the queries to use; all by default.

    Returns:
        ``[H]`` float64, nats.

    Raises:
        TypeError: attention that is not floating, a floating mask.
        ValueError: wrong rank or shape, no query selected, or rows that are no probabilities.

    >>> attention_entropy(torch.full((1, 1, 1, 2), 0.5))
    tensor([0.6931], dtype=torch.float64)
    """
    _attention_entropy_check(attention, mask)
    total, count = _attention_entropy_update(attention, mask)
    check_selects(mask, int(count))
    if not bool(torch.isfinite(total).all()):
        raise ValueError(
            "Expected argument `attention` to hold probabilities but got negative values or NaN: pass the "
            "weights after the softmax."
        )
    return total / count
