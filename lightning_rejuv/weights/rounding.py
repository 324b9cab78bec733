"""Stochastic rounding to half types, and the streams of random numbers that it draws from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_rejuv.ops.lerp import kernels_on

# How many of the low bits of a float32 each half type drops.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
HALF_TYPES = frozenset(_DROPPED)


def random_stream(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a stream of random numbers that is a function of a key alone, on one kind of device.

    Args:
        key: whatever tells this stream from the others.
        device: where it is drawn if that is a CUDA device without kernels; other streams are drawn on the CPU.

    >>> first, second = (torch.rand(1, generator=random_stream("0 layer.weight")) for _ in range(2))
    >>> torch.equal(first, second)
    True
    """
    device = torch.device(device)
    generator = torch.Generator(device if device.type == "cuda" and not kernels_on(device) else "cpu")
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return generator.manual_seed(seed)


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours in a half type, up with the share of the way that is covered.

    The mean over many roundings is the exact value, so that a step that is lost in a single weight is not lost in all
    of them. Random low bits are added to a float32 and cut off (Croci et al. 2022, "Stochastic rounding:
    implementation, error analysis and applications", §7); to those of a subnormal float16 after a shift by the smallest
    normal number, which gives all of them one exponent and rounds them to 2^-13 of a step first. What ``dtype`` holds
    stays as it is, bit for bit. NaN, infinity and what lies beyond the largest finite number are rounded to nearest.

    Args:
        exact: float32 or float64, any shape; float64 is rounded to float32 first.
        dtype: ``torch.bfloat16`` or ``torch.float16``. Any other dtype is rounded to nearest, and nothing is drawn.
        generator: of the random bits, 16 for each element; they are drawn on its device.

    Returns:
        A tensor of ``dtype``, in the shape and on the device of ``exact``.

    >>> x = torch.full((10_000,), 1.0 + 1 / 512)  # a quarter of the way from 1 to its bfloat16 neighbour
    >>> y = round_stochastically(x, torch.bfloat16, torch.Generator().manual_seed(0))
    >>> sorted(set(y.tolist())), abs(y.double().mean().item() - x[0].item()) < 1e-4
    ([1.0, 1.0078125], True)
    """
    if dtype not in _DROPPED:
        return exact.to(dtype)
    value = exact.float()
    drawn = _random_bits(value.numel(), generator).view(torch.uint16)  # which widens to zeros above its bits
    bits = drawn.to(torch.int32).to(value.device).view(value.shape)
    rounded = _add_and_cut(value, bits, dtype).to(dtype)
    largest = torch.finfo(dtype).max
    # On a CPU most values are settled by the sum of their squares, which bounds them; NaN and infinity fail, too.
    flat = value.reshape(-1)
    if value.device.type == "cpu" and float(torch.dot(flat, flat)) <= (largest / 2) ** 2:
        return rounded  # on another device the sum would have to be waited for
    return torch.where(value.abs() <= largest, rounded, value.to(dtype))


def _add_and_cut(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 with 16 random bits, which are overwritten, to float32 whose low bits are zero."""
    low = (1 << _DROPPED[dtype]) - 1
    if dtype == torch.bfloat16:
        bits += value.view(torch.int32)
        bits &= ~low
        return bits.view(torch.float32)
    bits &= low
    smallest = torch.finfo(dtype).smallest_normal
    shift = ((value.abs() < smallest) * smallest).copysign(value)
    bits += (value + shift).view(torch.int32)
    bits &= ~low
    return (bits.view(torch.float32) - shift).copysign(value)  # a negative zero stays one


def _random_bits(count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` int16 with all bits random: one draw of 64 bits gives four."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
