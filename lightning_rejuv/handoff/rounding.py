"""From the dtype of the arithmetic to the dtype of the checkpoint: to nearest, or stochastically."""

from __future__ import annotations

import torch
from torch import Tensor


def to_nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round once, ties to even."""
    return exact.to(dtype)


def stochastic_round(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, up with the share of the way that is covered.

    The mean over many roundings is the exact value, so that a small step is not lost as a whole where it is
    lost in every single weight. Values that ``dtype`` holds stay as they are.

    Args:
        exact: float32 or float64, any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``; any wider dtype is rounded to nearest.
        generator: of the random numbers.

    >>> x = torch.full((10_000,), 1.0 + 1 / 512)  # a quarter of the way from 1 to its bfloat16 neighbour
    >>> y = stochastic_round(x, torch.bfloat16, torch.Generator().manual_seed(0))
    >>> sorted(set(y.tolist())), abs(y.double().mean().item() - x[0].item()) < 1e-4
    ([1.0, 1.0078125], True)
    """
    if dtype.itemsize != 2:
        return to_nearest(exact, dtype)
    nearest = exact.to(dtype)
    # Half types are sign and magnitude: the bit pattern minus one is the neighbour on zero's side.
    low = nearest.view(torch.int16) - (nearest.to(exact.dtype).abs() > exact.abs()).to(torch.int16)
    floor = low.view(dtype).to(exact.dtype)
    ceiling = (low + 1).view(dtype).to(exact.dtype)
    covered = (exact - floor) / (ceiling - floor)
    drawn = torch.rand(exact.shape, generator=generator, dtype=exact.dtype)
    up = (drawn < covered) & ceiling.isfinite()
    return (low + up.to(torch.int16)).view(dtype)
