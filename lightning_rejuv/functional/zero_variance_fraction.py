"""Share of prompts that give a group-relative policy gradient nothing to learn from."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rewards(rewards: Tensor) -> None:
    """Raise unless ``rewards`` is ``[prompts, group]``, finite, with groups of at least two."""
    if not isinstance(rewards, Tensor) or rewards.is_complex():
        got = str(rewards.dtype) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise TypeError(f"Expected argument `rewards` to be a real tensor but got {got}.")
    if rewards.ndim != 2 or rewards.shape[0] == 0 or rewards.shape[1] < 2:
        raise ValueError(
            "Expected argument `rewards` to have the shape [prompts, group] with at least one prompt and two "
            f"samples a prompt but got {tuple(rewards.shape)}."
        )
    if rewards.is_floating_point() and not bool(torch.isfinite(rewards).all()):
        raise ValueError("Expected argument `rewards` to be finite but got NaN or inf.")


def _zero_variance_fraction_update(rewards: Tensor) -> tuple[Tensor, Tensor]:
    same = (rewards == rewards[:, :1]).all(dim=1)
    return same.sum(), torch.full((), rewards.shape[0], device=rewards.device)


def zero_variance_fraction(rewards: Tensor) -> Tensor:
    r"""Fraction of groups whose rewards are all equal: their group-normalised advantage is zero.

    Equality is exact: rewards 0, 0, 0, 1e-6 do carry a gradient once they are divided by their deviation.

    Args:
        rewards: ``[prompts, group]``, any real dtype, at least two samples a group.

    Returns:
        float64 scalar in [0, 1].

    Raises:
        TypeError: not a real tensor.
        ValueError: another shape, NaN or inf.

    >>> zero_variance_fraction(torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]]))
    tensor(0.5000, dtype=torch.float64)
    """
    check_rewards(rewards)
    same, count = _zero_variance_fraction_update(rewards)
    return same.double() / count
