"""Size of an optimizer step relative to the weights."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.functional.relative_drift import relative_drift


def update_ratio(weight: Tensor, previous: Tensor) -> Tensor:
    r"""Relative size of an update, ``‖W_t - W_{t-1}‖₂ / ‖W_{t-1}‖₂``: the drift from one step before.

    In RL an over-trained model has the *larger* gradient norm and the *smaller* update (arXiv 2606.09932), so
    that the gradient norm alone misleads.

    Args:
        weight: any shape, any floating dtype, after the step.
        previous: a copy from before the step, of the same shape.

    Returns:
        float64 scalar; inf where only the previous weight is zero.

    Raises:
        TypeError: not floating tensors.
        ValueError: shapes differ.

    >>> import torch
    >>> update_ratio(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0]))
    tensor(0.2000, dtype=torch.float64)
    """
    return relative_drift(weight, previous)
