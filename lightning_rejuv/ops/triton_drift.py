"""Drift (op C) as a Triton kernel: each tile of both matrices is read once and feeds its rows and its columns."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are compiled by Triton, whose argument types do not exist for mypy.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rejuv.ops.triton_activation import COMBINE_TILE, combined
from lightning_rejuv.ops.triton_launch import OPTIONS, ceil_div, on_device, pick_split, resident_programs

DRIFT_TILE = {"BR": 8, "BC": 256, "NS": 3, **OPTIONS}


@triton.jit(do_not_specialize=["steps"])
def drift_partials(
    w_ptr,
    b_ptr,
    row_ptr,
    column_ptr,
    R,
    C,
    stride_wr,
    stride_wc,
    stride_br,
    stride_bc,
    steps,
    BR: tl.constexpr,
    BC: tl.constexpr,
    NS: tl.constexpr,
):
    """Write ``row [blocks, 4, R]`` and ``column [ranges, 4, C]`` float32, grid (blocks, ranges)."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    columns = block * BC + tl.arange(0, BC)
    in_columns = columns < C
    drift = tl.zeros((BR, BC), tl.float32)
    weight = tl.zeros((BR, BC), tl.float32)
    anchor = tl.zeros((BR, BC), tl.float32)
    largest = tl.zeros((BR, BC), tl.float32)
    w_offset = columns.to(tl.int64) * stride_wc
    b_offset = columns.to(tl.int64) * stride_bc
    row_base = row_ptr + block.to(tl.int64) * 4 * R
    quantity = tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
    for step in tl.range(0, steps, num_stages=NS):
        rows = (part * steps + step) * BR + tl.arange(0, BR)
        in_rows = rows < R
        inside = in_rows[:, None] & in_columns[None, :]
        wide = rows.to(tl.int64)[:, None]
        # No one reads the matrices again soon; the partial tables are to stay in the cache instead.
        w = tl.load(
            w_ptr + (wide * stride_wr + w_offset[None, :]),
            mask=inside,
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        b = tl.load(
            b_ptr + (wide * stride_br + b_offset[None, :]),
            mask=inside,
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        d = w - b
        a = tl.abs(d)
        drift += d * d
        weight += w * w
        anchor += b * b
        largest = tl.maximum(largest, a)
        row_drift = tl.sum(d * d, 1)
        row_weight = tl.sum(w * w, 1)
        row_anchor = tl.sum(b * b, 1)
        # A maximum drops NaN, a sum of squares does not.
        peak = tl.where(row_drift == row_drift, tl.max(a, 1), row_drift)
        # One store for all four: each store would make the warps wait for each other.
        four = tl.join(tl.join(row_drift, row_weight), tl.join(row_anchor, peak))
        at = row_base + quantity * R + rows[:, None, None]
        tl.store(at, four, mask=in_rows[:, None, None])
    column_drift = tl.sum(drift, 0)
    column_base = column_ptr + part.to(tl.int64) * 4 * C + columns
    tl.store(column_base, column_drift, mask=in_columns)
    tl.store(column_base + C, tl.sum(weight, 0), mask=in_columns)
    tl.store(column_base + 2 * C, tl.sum(anchor, 0), mask=in_columns)
    peak = tl.where(column_drift == column_drift, tl.max(largest, 0), column_drift)
    tl.store(column_base + 3 * C, peak, mask=in_columns)


@triton.jit(do_not_specialize=["blocks", "ranges"])
def combine_drift(
    row_ptr, column_ptr, rows_ptr, columns_ptr, blocks, ranges, R, C, BS: tl.constexpr, BN: tl.constexpr
):
    """Write ``rows [4, R]`` and ``columns [4, C]``. Grid (blocks of rows, then of columns; 4)."""
    wide = rows_ptr.dtype.element_ty
    block = tl.program_id(0)
    q = tl.program_id(1)
    row_blocks = tl.cdiv(R, BN)
    if block < row_blocks:
        at = block * BN + tl.arange(0, BN)
        total, peak = combined(row_ptr, blocks, R, at, q, 4, wide, BS)
        tl.store(rows_ptr + q.to(tl.int64) * R + at, tl.where(q == 3, peak, total), mask=at < R)
    else:
        at = (block - row_blocks) * BN + tl.arange(0, BN)
        total, peak = combined(column_ptr, ranges, C, at, q, 4, wide, BS)
        tl.store(columns_ptr + q.to(tl.int64) * C + at, tl.where(q == 3, peak, total), mask=at < C)


def weight_drift(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of the rows ``[4, R]`` and of the columns ``[4, C]`` in float64."""
    R, C = weight.shape
    blocks = ceil_div(C, DRIFT_TILE["BC"])
    split, chunk = pick_split(
        R, DRIFT_TILE["BR"], blocks, resident_programs(weight.device, DRIFT_TILE["num_warps"]), max_split=256
    )
    row_part = torch.empty((blocks, 4, R), dtype=torch.float32, device=weight.device)
    column_part = torch.empty((split, 4, C), dtype=torch.float32, device=weight.device)
    rows = torch.empty((4, R), dtype=torch.float64, device=weight.device)
    columns = torch.empty((4, C), dtype=torch.float64, device=weight.device)
    with on_device(weight.device):
        drift_partials[(blocks, split)](
            weight,
            base,
            row_part,
            column_part,
            R,
            C,
            *weight.stride(),
            *base.stride(),
            chunk // DRIFT_TILE["BR"],
            **DRIFT_TILE,
        )
        width = COMBINE_TILE["BN"]
        combine_drift[(ceil_div(R, width) + ceil_div(C, width), 4)](
            row_part, column_part, rows, columns, blocks, split, R, C, **COMBINE_TILE
        )
    return rows, columns
