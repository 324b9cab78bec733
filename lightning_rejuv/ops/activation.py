"""Statistics of each neuron over the tokens, added to an accumulator in one read of the inputs (ops A and B)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rejuv.ops._inputs import (
    accumulator_dtype,
    check_device,
    check_floating,
    check_leading,
    check_plain,
    matrices,
    split_rows,
)
from lightning_rejuv.ops._library import registered


class ActivationStats(NamedTuple):
    """Sums over the kept tokens, each ``[N]``; views of one accumulator ``[7, N]``."""

    abs_sum: Tensor
    signed_sum: Tensor
    square_sum: Tensor
    abs_max: Tensor
    near_zero: Tensor
    positive: Tensor
    tokens: Tensor


class GradActivationStats(NamedTuple):
    """Sums over the kept tokens, each ``[N]``; views of one accumulator ``[4, N]``."""

    abs_product: Tensor
    abs_grad: Tensor
    product: Tensor
    tokens: Tensor


def _accumulator(out: Tensor | None, rows: int, h: Tensor) -> Tensor:
    shape = (rows, h.shape[-1])
    if out is None:
        return torch.zeros(shape, dtype=accumulator_dtype(h.device), device=h.device)
    if (
        tuple(out.shape) != shape
        or out.dtype not in (torch.float64, torch.float32)
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"Expected argument `out` to be a contiguous float64 or float32 tensor of shape {shape} but got "
            f"shape {tuple(out.shape)}, {out.dtype}, strides {out.stride()}."
        )
    check_device("out", out, "h", h)
    return out


def _kept(mask: Tensor | None, h: Tensor) -> Tensor | None:
    if mask is None:
        return None
    check_leading("mask", mask, "h", h)
    return mask if mask.dtype == torch.bool else mask != 0


def activation_stats(
    h: Tensor, mask: Tensor | None = None, *, eps: float = 0.0, out: Tensor | None = None
) -> ActivationStats:
    """Add Σ|h|, Σh, Σh², max|h|, #(|h| ≤ eps), #(h > 0) and the number of tokens to an accumulator.

    One read of ``h``, whatever its strides; no gradient. The formula is ``ops.reference.activation_stats``.

    Args:
        h: Activations ``[..., N]``, any floating point dtype.
        mask: Optional ``[...]``; tokens where it is zero are left out and not read.
        eps: Threshold of "near zero", not negative; compared in float32.
        out: Accumulator ``[7, N]``, contiguous float64 or float32, updated in place, zeros before
            the first call; a new one by default. float32 stops counting at 2²⁴ tokens.

    Returns:
        The accumulator's rows. A NaN among the kept tokens stays in its neuron.

    Raises:
        TypeError: If ``h`` is not of a floating point dtype, or a DTensor.
        ValueError: If ``eps`` is negative, or ``mask`` or ``out`` do not fit ``h``.

    Example:
        >>> import torch
        >>> from lightning_rejuv import ops
        >>> stats = ops.activation_stats(torch.tensor([[1.0, -2.0], [0.0, 4.0]]), eps=0.5)
        >>> stats.abs_sum.tolist(), stats.near_zero.tolist(), stats.tokens.tolist()
        ([1.0, 6.0], [1.0, 0.0], [2.0, 2.0])
    """
    check_plain(h=h, mask=mask, out=out)
    check_floating(h=h)
    if not eps >= 0.0:
        raise ValueError(f"Expected argument `eps` to be a non-negative float but got {eps}.")
    kept = _kept(mask, h)
    accumulator = _accumulator(out, len(ActivationStats._fields), h)
    parts = matrices(h.detach())
    for (x,), part_mask in zip(parts, split_rows(kept, parts), strict=True):
        registered.activation_stats_.default(accumulator, x, part_mask, float(eps))
    return ActivationStats(*accumulator.unbind(0))


def grad_activation_stats(
    h: Tensor, grad: Tensor, mask: Tensor | None = None, *, out: Tensor | None = None
) -> GradActivationStats:
    """Add Σ|g·h|, Σ|g|, Σg·h and the number of tokens to an accumulator, g being the gradient at h.

    The sum suits a score that is updated while a model trains. The neurons of a reset are scored by
    ``lightning_rejuv.attribution`` instead. The formula is ``ops.reference.grad_activation_stats``.

    Args:
        h: Activations ``[..., N]``, any floating point dtype.
        grad: Gradient of the loss at ``h``, of its shape.
        mask: Optional ``[...]``; tokens where it is zero are left out and not read.
        out: Accumulator ``[4, N]``, contiguous float64 or float32, updated in place; a new one of zeros by
            default.

    Returns:
        The accumulator's rows.

    Raises:
        TypeError: If ``h`` or ``grad`` is not of a floating point dtype, or a DTensor.
        ValueError: If the shapes or devices of ``grad``, ``mask`` or ``out`` do not fit ``h``.

    Example:
        >>> import torch
        >>> from lightning_rejuv import ops
        >>> h, g = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[0.5, 1.0], [-0.5, 0.0]])
        >>> stats = ops.grad_activation_stats(h, g)
        >>> stats.abs_product.tolist(), stats.product.tolist()
        ([2.0, 2.0], [-1.0, -2.0])
    """
    check_plain(h=h, grad=grad, mask=mask, out=out)
    check_floating(h=h, grad=grad)
    if grad.shape != h.shape:
        raise ValueError(
            f"Expected argument `grad` to have the shape of `h` {tuple(h.shape)} but got {tuple(grad.shape)}."
        )
    check_device("grad", grad, "h", h)
    kept = _kept(mask, h)
    accumulator = _accumulator(out, len(GradActivationStats._fields), h)
    parts = matrices(h.detach(), grad.detach())
    for (x, g), part_mask in zip(parts, split_rows(kept, parts), strict=True):
        registered.grad_activation_stats_.default(accumulator, x, g, part_mask)
    return GradActivationStats(*accumulator.unbind(0))


def merge_activation_stats(tables: Tensor) -> Tensor:
    """Merge the accumulators of several ranks or runs: the maximum of ``abs_max``, the sum of the rest.

    Args:
        tables: ``[P, 7, N]``, the stacked accumulators of `activation_stats`.

    Returns:
        ``[7, N]``; ``ActivationStats(*table)`` names its rows.

    Raises:
        ValueError: If ``tables`` has another shape.
    """
    if tables.dim() != 3 or tables.shape[1] != len(ActivationStats._fields):
        raise ValueError(f"Expected argument `tables` to have shape [P, 7, N] but got {tuple(tables.shape)}.")
    merged = tables.sum(0)
    largest = ActivationStats._fields.index("abs_max")
    merged[largest] = tables[:, largest].amax(0)
    return merged
