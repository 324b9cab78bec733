"""Probability that at least one of k samples solves a problem."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count


def _broadcast(n: int | Tensor, c: int | Tensor) -> tuple[Tensor, Tensor]:
    solved = torch.as_tensor(c)
    trials = torch.as_tensor(n, device=solved.device)
    shape = torch.broadcast_shapes(trials.shape, solved.shape)
    return trials.expand(shape), solved.expand(shape)


def _pass_at_k_values(n: Tensor, c: Tensor, k: int) -> Tensor:
    """``1 - Π_{j<k} (n - c - j) / (n - j)`` in float64: every factor is exact, nothing overflows."""
    trials = n.to(torch.float64)
    failures = trials - c
    none = torch.ones_like(failures)
    for j in range(k):
        none *= ((failures - j) / (trials - j)).clamp_min(0.0)
    return 1.0 - none


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


def pass_at_k(n: int | Tensor, c: int | Tensor, k: int) -> Tensor:
    r"""Unbiased pass@k per problem, ``1 - C(n-c, k) / C(n, k)``.

    Chen et al. 2021 (arXiv 2107.03374, equation 1). ``1 - (1 - c/n)^k`` is biased low against it.

    Args:
        n: samples drawn per problem, at least k; an int or ``[...]`` integers.
        c: of these, how many succeed; an int or ``[...]`` integers.
        k: how many samples one may use.

    Returns:
        ``[...]`` float64 probabilities, one per problem; take the mean for the usual figure.

    Raises:
        TypeError: not integers.
        ValueError: k < 1, n < k, or c outside [0, n].

    >>> pass_at_k(4, torch.tensor([0, 1, 4]), k=2)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    _pass_at_k_check(n, c, k)
    trials, solved = _broadcast(n, c)
    return _pass_at_k_values(trials, solved, k)
