"""The sums of which drift and sparsity are made, in one pass over a weight and its base."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.ops._inputs import check_plain
from lightning_rejuv.ops.drift import weight_drift

# A quarter of a megabyte in float32: the difference stays in the cache, and its sum keeps five digits and more.
_ELEMENTS_PER_BLOCK = 2**16
# On other devices fewer launches matter more; the temporaries take 64 MB.
_ELEMENTS_PER_DEVICE_BLOCK = 2**24


def drift_sums(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ(w - b)² and Σb², float64, of two tensors of one shape; the base is moved to the weight's device."""
    if weight.device.type == "cpu":
        return blocked_sums(weight, base, None)[:2]
    drift = weight_drift(as_matrix(weight), as_matrix(base.to(weight.device)))
    return drift.rows.drift_square.sum(), drift.rows.base_square.sum()


def all_drift_sums(weight: Tensor, base: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`drift_sums` and the number of ``|w - b| <= tolerance``, in one read if that is cheap."""
    if weight.device.type == "cpu":
        return blocked_sums(weight, base, tolerance)
    return (*drift_sums(weight, base), blocked_sums(weight, base, tolerance)[2])


def blocked_sums(weight: Tensor, base: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`drift_sums` and the number of ``|w - b| <= tolerance``, block by block.

    It takes about half the time of ``weight_drift`` on a CPU, which also gives rows and columns. Without a tolerance
    nothing is counted.
    """
    check_plain(weight=weight, base=base)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, base.dtype), torch.float32)
    size = _ELEMENTS_PER_BLOCK if weight.device.type == "cpu" else _ELEMENTS_PER_DEVICE_BLOCK
    w = torch.split(weight.detach().reshape(-1), size)
    b = torch.split(base.detach().to(weight.device).reshape(-1), size)
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


def as_matrix(tensor: Tensor) -> Tensor:
    """View a tensor of any rank as a matrix."""
    return tensor if tensor.ndim == 2 else tensor.reshape(max(1, tensor.shape[0] if tensor.ndim else 1), -1)
