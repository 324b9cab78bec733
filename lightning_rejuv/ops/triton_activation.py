"""Activation statistics (ops A and B) as Triton kernels.

Float32 sums of row ranges are added to the accumulator in a fixed order. Two stages instead of atomics make the
result bitwise repeatable. Each element costs few instructions because the accumulators keep the tile's shape
and are reduced once at the end, and because counts are predicated float adds.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are compiled by Triton, whose argument types do not exist for mypy.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rejuv.ops.triton_launch import OPTIONS, ceil_div, on_device, pick_split, resident_programs

#: Columns of a tile (128 bytes at least) and depth of the load pipeline; the rows are a matter of the element size.
ACTIVATION_TILE = {"BN": 64, "NS": 4, **OPTIONS, "num_warps": 2}
COMBINE_TILE = {"BS": 8, "BN": 256, **OPTIONS}


@triton.jit(do_not_specialize=["T", "chunk"])
def activation_partials(
    h_ptr,
    mask_ptr,
    part_ptr,
    T,
    N,
    stride_t,
    stride_n,
    eps,
    chunk,
    HAS_MASK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    NS: tl.constexpr,
):
    """Write the statistics of one range of rows: ``part [S, 7, N]`` float32, grid (column blocks, S)."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    in_columns = columns < N
    first = part * chunk
    last = tl.minimum(first + chunk, T)
    abs_sum = tl.zeros((BT, BN), tl.float32)
    signed_sum = tl.zeros((BT, BN), tl.float32)
    square_sum = tl.zeros((BT, BN), tl.float32)
    abs_max = tl.zeros((BT, BN), tl.float32)
    near_zero = tl.zeros((BT, BN), tl.float32)
    positive = tl.zeros((BT, BN), tl.float32)
    absent = tl.zeros((BT,), tl.float32)
    column_offset = columns.to(tl.int64) * stride_n
    for row in tl.range(first, last, BT, num_stages=NS):
        rows = row + tl.arange(0, BT)
        kept = rows < last
        if HAS_MASK:
            kept = kept & (tl.load(mask_ptr + rows, mask=kept, other=0) != 0)
        x = tl.load(
            h_ptr + rows.to(tl.int64)[:, None] * stride_t + column_offset[None, :],
            mask=kept[:, None] & in_columns[None, :],
            other=0.0,
        ).to(tl.float32)
        a = tl.abs(x)
        abs_sum += a
        signed_sum += x
        square_sum += x * x
        abs_max = tl.maximum(abs_max, a)
        near_zero = tl.where(a <= eps, near_zero + 1.0, near_zero)
        positive = tl.where(x > 0, positive + 1.0, positive)
        absent += tl.where(kept, 0.0, 1.0)
    # Rows left out were loaded as 0, which counts as near zero: they are subtracted, once for the whole loop.
    left_out = tl.sum(absent, 0)
    steps = (last - first + BT - 1) // BT
    total = tl.sum(abs_sum, 0)
    base = part_ptr + part.to(tl.int64) * 7 * N + columns
    tl.store(base, total, mask=in_columns)
    tl.store(base + N, tl.sum(signed_sum, 0), mask=in_columns)
    tl.store(base + 2 * N, tl.sum(square_sum, 0), mask=in_columns)
    # A maximum drops NaN, a sum of absolute values does not.
    tl.store(base + 3 * N, tl.where(total == total, tl.max(abs_max, 0), total), mask=in_columns)
    tl.store(base + 4 * N, tl.sum(near_zero, 0) - left_out, mask=in_columns)
    tl.store(base + 5 * N, tl.sum(positive, 0), mask=in_columns)
    tl.store(base + 6 * N, tl.zeros((BN,), tl.float32) + (steps * BT - left_out), mask=in_columns)


@triton.jit(do_not_specialize=["T", "chunk"])
def grad_activation_partials(
    h_ptr,
    grad_ptr,
    mask_ptr,
    part_ptr,
    T,
    N,
    stride_ht,
    stride_hn,
    stride_gt,
    stride_gn,
    chunk,
    HAS_MASK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    NS: tl.constexpr,
):
    """Write the four sums of one range of rows: ``part [S, 4, N]`` float32, grid (column blocks, S)."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    in_columns = columns < N
    first = part * chunk
    last = tl.minimum(first + chunk, T)
    abs_product = tl.zeros((BT, BN), tl.float32)
    abs_grad = tl.zeros((BT, BN), tl.float32)
    product = tl.zeros((BT, BN), tl.float32)
    present = tl.zeros((BT,), tl.float32)
    h_offset = columns.to(tl.int64) * stride_hn
    grad_offset = columns.to(tl.int64) * stride_gn
    for row in tl.range(first, last, BT, num_stages=NS):
        rows = row + tl.arange(0, BT)
        kept = rows < last
        if HAS_MASK:
            kept = kept & (tl.load(mask_ptr + rows, mask=kept, other=0) != 0)
        inside = kept[:, None] & in_columns[None, :]
        wide = rows.to(tl.int64)[:, None]
        x = tl.load(h_ptr + wide * stride_ht + h_offset[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + wide * stride_gt + grad_offset[None, :], mask=inside, other=0.0).to(tl.float32)
        p = x * g
        abs_product += tl.abs(p)
        abs_grad += tl.abs(g)
        product += p
        present += tl.where(kept, 1.0, 0.0)
    base = part_ptr + part.to(tl.int64) * 4 * N + columns
    tl.store(base, tl.sum(abs_product, 0), mask=in_columns)
    tl.store(base + N, tl.sum(abs_grad, 0), mask=in_columns)
    tl.store(base + 2 * N, tl.sum(product, 0), mask=in_columns)
    tl.store(base + 3 * N, tl.zeros((BN,), tl.float32) + tl.sum(present, 0), mask=in_columns)


@triton.jit
def combined(part_ptr, S, N, columns, q, Q: tl.constexpr, wide: tl.constexpr, BS: tl.constexpr):
    """Return the sum and the maximum of quantity ``q`` of ``part [S, Q, N]`` for some columns, in dtype ``wide``."""
    in_columns = (columns < N)[None, :]
    total = tl.zeros((columns.shape[0],), wide)
    largest = tl.zeros_like(total).to(tl.float32)
    undefined = tl.zeros_like(total).to(tl.int32)
    for s in range(0, S, BS):
        parts = s + tl.arange(0, BS)
        value = tl.load(
            part_ptr + (parts.to(tl.int64)[:, None] * Q + q) * N + columns[None, :],
            mask=(parts < S)[:, None] & in_columns,
            other=0.0,
        )
        total += tl.sum(value.to(wide), 0)
        largest = tl.maximum(largest, tl.max(value, 0))
        undefined += tl.sum((value != value).to(tl.int32), 0)
    # A maximum drops NaN.
    return total, tl.where(undefined > 0, float("nan"), largest).to(wide)


@triton.jit(do_not_specialize=["S"])
def combine_partials(
    part_ptr, out_ptr, S, N, Q: tl.constexpr, MAXIMUM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr
):
    """Add ``part [S, Q, N]`` to ``out [Q, N]``; row ``MAXIMUM`` takes the maximum. Grid (blocks, Q)."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    q = tl.program_id(1)
    total, peak = combined(part_ptr, S, N, columns, q, Q, out_ptr.dtype.element_ty, BS)
    out = out_ptr + q.to(tl.int64) * N + columns
    old = tl.load(out, mask=columns < N, other=0.0)
    # Written so that a NaN on either side wins.
    maximum = tl.where((peak > old) | (peak != peak), peak, old)
    tl.store(out, tl.where(q == MAXIMUM, maximum, old + total), mask=columns < N)


def activation_tile(*inputs: Tensor) -> dict[str, int]:
    """Return a tile of 2 KiB: two 16-byte loads for each thread, and no more registers than there are."""
    return {"BT": 16 if all(x.element_size() == 2 for x in inputs) else 8, **ACTIVATION_TILE}


def combine(part: Tensor, out: Tensor, maximum: int) -> None:
    """Add partial tables ``[S, Q, N]`` to ``out [Q, N]``; row ``maximum`` (-1: none) takes the maximum."""
    split, quantities, columns = part.shape
    grid = (ceil_div(columns, COMBINE_TILE["BN"]), quantities)
    combine_partials[grid](part, out, split, columns, Q=quantities, MAXIMUM=maximum, **COMBINE_TILE)


def activation_stats_(accumulator: Tensor, h: Tensor, mask: Tensor | None, eps: float) -> None:
    """Add the statistics of ``h [T, N]`` to ``accumulator [7, N]``."""
    tokens, neurons = h.shape
    if tokens == 0 or neurons == 0:
        return
    tile = activation_tile(h)
    blocks = ceil_div(neurons, tile["BN"])
    split, chunk = pick_split(tokens, tile["BT"], blocks, resident_programs(h.device, tile["num_warps"]))
    part = torch.empty((split, 7, neurons), dtype=torch.float32, device=h.device)
    with on_device(h.device):
        activation_partials[(blocks, split)](
            h,
            h if mask is None else mask,
            part,
            tokens,
            neurons,
            *h.stride(),
            eps,
            chunk,
            HAS_MASK=mask is not None,
            **tile,
        )
        combine(part, accumulator, maximum=3)


def grad_activation_stats_(accumulator: Tensor, h: Tensor, grad: Tensor, mask: Tensor | None) -> None:
    """Add the gradient × activation sums of ``h, grad [T, N]`` to ``accumulator [4, N]``."""
    tokens, neurons = h.shape
    if tokens == 0 or neurons == 0:
        return
    tile = activation_tile(h, grad)
    blocks = ceil_div(neurons, tile["BN"])
    split, chunk = pick_split(tokens, tile["BT"], blocks, resident_programs(h.device, tile["num_warps"]))
    part = torch.empty((split, 4, neurons), dtype=torch.float32, device=h.device)
    with on_device(h.device):
        grad_activation_partials[(blocks, split)](
            h,
            grad,
            h if mask is None else mask,
            part,
            tokens,
            neurons,
            *h.stride(),
            *grad.stride(),
            chunk,
            HAS_MASK=mask is not None,
            **tile,
        )
        combine(part, accumulator, maximum=-1)
