"""Probability that a group of rollouts is all success or all failure."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count


def zero_variance_probability(p: float | Tensor, group_size: int) -> Tensor:
    r"""Probability of a group without a learning signal, ``p^g + (1 - p)^g``, for a binary reward.

    It follows from g independent rollouts at pass rate p; arXiv 2606.18487.

    Args:
        p: pass rate(s) in [0, 1]: a number, or a tensor of any real dtype.
        group_size: rollouts a prompt, g >= 2.

    Returns:
        float64 of the shape of ``p``.

    Raises:
        ValueError: p outside [0, 1], or g < 2.

    >>> zero_variance_probability(0.5, 2)
    tensor(0.5000, dtype=torch.float64)
    """
    check_count("group_size", group_size, at_least=2)
    rate = torch.as_tensor(p, dtype=torch.float64)  # at once: a Python number never goes through float32
    if not bool(((rate >= 0) & (rate <= 1)).all()):
        raise ValueError(f"Expected argument `p` to lie in [0, 1] but got {rate.min():g} to {rate.max():g}.")
    return rate.pow(group_size) + (1 - rate).pow(group_size)
