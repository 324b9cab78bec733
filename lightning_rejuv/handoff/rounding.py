"""From the dtype of the arithmetic to the dtype of the checkpoint: to nearest, or stochastically."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_rejuv.options import ROUNDINGS


def check_rounding(rounding: str, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse a rounding that is none, or that nothing in the output would be rounded with.

    Args:
        rounding: ``"nearest"`` or ``"stochastic"``.
        dtypes: of the output's tensors.

    Raises:
        ValueError: with what was got.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"Expected argument `rounding` to be one of {ROUNDINGS} but got {rounding!r}.")
    found = set(dtypes)
    if rounding == "stochastic" and not found & {torch.bfloat16, torch.float16}:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in found)
        raise ValueError(
            f'Expected tensors of a half type with `rounding="stochastic"` (`--stochastic-rounding`) but the output '
            f"holds {', '.join(names)}: it would have no effect. Leave it out, or pass `dtype` (`--dtype bfloat16`)."
        )


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
    rounded = (low + (drawn < covered).to(torch.int16)).view(dtype)
    return torch.where(nearest.isinf(), nearest, rounded)  # an overflow is for the caller to see
