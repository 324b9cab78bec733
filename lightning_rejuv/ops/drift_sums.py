"""The sums of which drift and sparsity are made, in one pass over a weight and its base."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_rejuv.ops._inputs import check_plain
from lightning_rejuv.ops._library import KERNEL_DTYPES, triton_installed
from lightning_rejuv.ops.blocked import one_thread

# A quarter of a megabyte in float32: the difference stays in the cache, and its sum keeps five digits and more.
_ELEMENTS_PER_BLOCK = 2**16
# On other devices fewer launches matter more; the temporaries take 64 MB.
_ELEMENTS_PER_DEVICE_BLOCK = 2**24


def drift_sums(weight: Tensor, base: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ(w - b)², Σb² and the number of ``|w - b| <= tolerance`` of two tensors of one shape, in one read.

    Nothing waits for the device. On a CPU it takes about half the time of ``weight_drift``, which also gives rows and
    columns.

    Args:
        weight: of any shape and any floating dtype.
        base: of the same shape; moved to the weight's device.
        tolerance: None counts nothing.

    Returns:
        Scalars on the weight's device: two in float64 and a whole number, 0 without a tolerance.
    """
    check_plain(weight=weight, base=base)
    weight, base = weight.detach(), base.detach().to(weight.device)
    if (
        weight.is_cuda
        and weight.numel()
        and {weight.dtype, base.dtype} <= KERNEL_DTYPES
        and triton_installed()
    ):
        from lightning_rejuv.ops import triton_drift_sums

        sums = triton_drift_sums.drift_sums(weight.contiguous(), base.contiguous(), tolerance or 0.0)
        unmoved = sums[2].to(torch.int64)
        return sums[0], sums[1], unmoved if tolerance is not None else torch.zeros_like(unmoved)
    with one_thread() if weight.device.type == "cpu" else nullcontext():
        return _blocked(weight, base, tolerance)


def _blocked(weight: Tensor, base: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, base.dtype), torch.float32)
    size = _ELEMENTS_PER_BLOCK if weight.device.type == "cpu" else _ELEMENTS_PER_DEVICE_BLOCK
    w = torch.split(weight.reshape(-1), size)
    b = torch.split(base.reshape(-1), size)
    squares, base_squares, unmoved = [], [], torch.zeros((), dtype=torch.int64, device=weight.device)
    for w_block, b_block in zip(w, b, strict=True):
        reference = b_block.to(dtype)
        difference = w_block.to(dtype) - reference
        squares.append(torch.dot(difference, difference))
        base_squares.append(torch.dot(reference, reference))
        if tolerance == 0:
            unmoved += difference.numel() - torch.count_nonzero(difference)
        elif tolerance is not None:
            unmoved += torch.count_nonzero(difference.abs() <= tolerance)
    return _total(squares), _total(base_squares), unmoved


def _total(squares: list[Tensor]) -> Tensor:
    return torch.stack(squares).double().sum()
