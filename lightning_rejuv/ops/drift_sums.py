"""The sums of which drift and sparsity are made, in one pass over a weight and its base."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_rejuv.ops._inputs import check_plain
from lightning_rejuv.ops._library import has_kernel
from lightning_rejuv.ops.blocked import one_thread

# A quarter of a megabyte in float32: the difference stays in the cache, and its sum keeps five digits and more.
_ELEMENTS_PER_BLOCK = 2**16
# On other devices fewer launches matter more; the temporaries take 64 MB.
_ELEMENTS_PER_DEVICE_BLOCK = 2**24


def drift_sums(weight: Tensor, base: Tensor, tolerance: float = 0.0) -> Tensor:
    """Return Σ(w - b)², Σb² and the number of ``|w - b| <= tolerance`` of two tensors of one shape, in one read.

    Nothing waits for the device. On a CPU it takes about half the time of ``weight_drift``, which also gives rows and
    columns.

    Args:
        weight: of any shape and any floating dtype.
        base: of the same shape; moved to the weight's device.
        tolerance: the largest difference that counts as none.

    Returns:
        ``[3]`` float64 on the weight's device; on the CPU if that device has no float64.

    >>> drift_sums(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor([ 4., 17.,  1.], dtype=torch.float64)
    """
    check_plain(weight=weight, base=base)
    weight, base = weight.detach(), base.detach().to(weight.device)
    if weight.is_cuda and weight.numel() and has_kernel(weight, base):
        from lightning_rejuv.ops import triton_drift_sums

        return triton_drift_sums.drift_sums(weight.contiguous(), base.contiguous(), tolerance)
    with one_thread() if weight.device.type == "cpu" else nullcontext():
        return _blocked(weight, base, tolerance)


def _blocked(weight: Tensor, base: Tensor, tolerance: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, base.dtype), torch.float32)
    size = _ELEMENTS_PER_BLOCK if weight.device.type == "cpu" else _ELEMENTS_PER_DEVICE_BLOCK
    blocks = zip(weight.reshape(-1).split(size), base.reshape(-1).split(size), strict=True)
    squares, base_squares, unmoved = [], [], []
    for w_block, b_block in blocks:
        reference = b_block.to(dtype)
        difference = w_block.to(dtype) - reference
        squares.append(torch.dot(difference, difference))
        base_squares.append(torch.dot(reference, reference))
        if tolerance == 0:
            unmoved.append(difference.numel() - torch.count_nonzero(difference))
        else:
            unmoved.append(torch.count_nonzero(difference.abs() <= tolerance))
    sums = torch.stack([torch.stack(parts).to(dtype) for parts in (squares, base_squares, unmoved)])
    return (sums.cpu() if sums.device.type == "mps" else sums).double().sum(1)
