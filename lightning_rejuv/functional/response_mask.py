"""Which positions of a batch predict a response token."""

from __future__ import annotations

import torch
from torch import Tensor


def response_mask(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Positions whose logits predict a labelled token.

    The logits at position t predict the token at t + 1, so that the mask is the labels' one, shifted; the
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
