"""Measures of rollouts: which problems repeated samples solve, and which groups carry a learning signal."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count


def _broadcast(n: int | Tensor, c: int | Tensor) -> tuple[Tensor, Tensor]:
    solved = torch.as_tensor(c)
    trials = torch.as_tensor(n, device=solved.device)
    shape = torch.broadcast_shapes(trials.shape, solved.shape)
    return trials.expand(shape), solved.expand(shape)


def _pass_at_k_check(n: int | Tensor, c: int | Tensor, k: int) -> None:
    check_count("k", k)
    for name, value in (("n", torch.as_tensor(n)), ("c", torch.as_tensor(c))):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"Expected argument `{name}` to hold integers but got {value.dtype}.")
    trials, solved = _broadcast(n, c)
    if trials.numel() and int(trials.min()) < k:
        raise ValueError(f"Expected argument `n` to be at least k = {k} samples but got {int(trials.min())}.")
    if bool(((solved < 0) | (solved > trials)).any()):
        raise ValueError("Expected argument `c` to count successes, 0 <= c <= n, but got values outside.")


def _pass_at_k_values(n: Tensor, c: Tensor, k: int) -> Tensor:
    """Return ``1 - Π_{j<k} (n - c - j) / (n - j)`` in float64: every factor is exact, nothing overflows."""
    trials = n.to(torch.float64)
    failures = trials - c
    none = torch.ones_like(failures)
    for j in range(k):
        none *= ((failures - j) / (trials - j)).clamp_min(0.0)
    return 1.0 - none


def pass_at_k(n: int | Tensor, c: int | Tensor, k: int) -> Tensor:
    r"""Unbiased pass@k per problem, ``1 - C(n-c, k) / C(n, k)``.

    Chen et al. 2021 (arXiv 2107.03374, equation 1). ``1 - (1 - c/n)^k`` is biased low against it.

    Args:
        n: samples drawn per problem, at least k; an int or ``[...]`` integers.
        c: how many of these succeed; an int or ``[...]`` integers.
        k: how many samples one may use.

    Returns:
        ``[...]`` float64 probabilities, one per problem; take the mean for the usual figure.

    Raises:
        TypeError: ``n`` or ``c`` are not integers.
        ValueError: k < 1, n < k, or c lies outside [0, n].

    >>> pass_at_k(4, torch.tensor([0, 1, 4]), k=2)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    _pass_at_k_check(n, c, k)
    trials, solved = _broadcast(n, c)
    return _pass_at_k_values(trials, solved, k)


def check_rewards(rewards: Tensor) -> None:
    """Raise unless ``rewards`` is ``[prompts, group]``, finite, with groups of at least two.

    Raises:
        TypeError: ``rewards`` is not a real tensor.
        ValueError: it has another shape, or holds NaN or inf.
    """
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
        TypeError: ``rewards`` is not a real tensor.
        ValueError: it has another shape, or holds NaN or inf.

    >>> zero_variance_fraction(torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]]))
    tensor(0.5000, dtype=torch.float64)
    """
    check_rewards(rewards)
    same, count = _zero_variance_fraction_update(rewards)
    return same.double() / count
