"""Share of activations that are not (nearly) zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_selects
from lightning_rejuv.functional.dormancy_scores import _activations_check
from lightning_rejuv.ops import activation_stats


def _threshold_check(threshold: float) -> None:
    if not isinstance(threshold, (int, float)) or not 0.0 <= threshold < float("inf"):
        raise ValueError(f"Expected argument `threshold` to be a float >= 0 but got {threshold!r}.")


def _active_fraction_compute(near_zero: Tensor, tokens: Tensor) -> Tensor:
    return 1.0 - near_zero.sum() / tokens.sum()


def active_fraction(activations: Tensor, mask: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    r"""Fraction of (token, neuron) pairs with ``|h| > threshold``.

    The fraction of active units of Ma et al. 2024 (arXiv 2310.07418) for ReLU at threshold 0. On
    smooth activations it is 1 at threshold 0; choose a threshold and compare with the base.

    Args:
        activations: ``[..., N]``, any floating dtype.
        mask: ``[...]`` bool, the tokens to use: counted padding would halve the figure at 50 % padding.
        threshold: the largest absolute value that counts as inactive.

    Returns:
        float64 scalar in [0, 1].

    Raises:
        TypeError: activations that are not floating, a floating mask.
        ValueError: wrong rank, another shape of the mask, no token selected, a negative threshold.

    >>> active_fraction(torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
    tensor(0.5000, dtype=torch.float64)
    """
    _activations_check(activations, mask)
    _threshold_check(threshold)
    stats = activation_stats(activations, mask, eps=threshold)
    check_selects(mask, int(stats.tokens[0]))
    return _active_fraction_compute(stats.near_zero.to(torch.float64), stats.tokens)
