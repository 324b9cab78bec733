"""Drift (op C) as a Triton kernel: each tile of both matrices is read once and feeds its rows and its columns."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are compiled by Triton, whose argument types do not exist for mypy.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rejuv.ops.triton_activation import combine
from lightning_rejuv.ops.triton_launch import OPTIONS, ceil_div, on_device, pick_split, resident_programs

DRIFT_TILE = {"BR": 8, "BC": 256, "NS": 1, **OPTIONS}


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
    for step in tl.range(0, steps, num_stages=NS):
        rows = (part * steps + step) * BR + tl.arange(0, BR)
        in_rows = rows < R
        inside = in_rows[:, None] & in_columns[None, :]
        wide = rows.to(tl.int64)[:, None]
        w = tl.load(w_ptr + wide * stride_wr + w_offset[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + wide * stride_br + b_offset[None, :], mask=inside, other=0.0).to(tl.float32)
        d = w - b
        a = tl.abs(d)
        drift += d * d
        weight += w * w
        anchor += b * b
        largest = tl.maximum(largest, a)
        row_drift = tl.sum(d * d, 1)
        tl.store(row_base + rows, row_drift, mask=in_rows)
        tl.store(row_base + R + rows, tl.sum(w * w, 1), mask=in_rows)
        tl.store(row_base + 2 * R + rows, tl.sum(b * b, 1), mask=in_rows)
        # A maximum drops NaN, a sum of squares does not.
        tl.store(
            row_base + 3 * R + rows, tl.where(row_drift == row_drift, tl.max(a, 1), row_drift), mask=in_rows
        )
    column_drift = tl.sum(drift, 0)
    column_base = column_ptr + part.to(tl.int64) * 4 * C + columns
    tl.store(column_base, column_drift, mask=in_columns)
    tl.store(column_base + C, tl.sum(weight, 0), mask=in_columns)
    tl.store(column_base + 2 * C, tl.sum(anchor, 0), mask=in_columns)
    peak = tl.where(column_drift == column_drift, tl.max(largest, 0), column_drift)
    tl.store(column_base + 3 * C, peak, mask=in_columns)


def weight_drift(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of the rows ``[4, R]`` and of the columns ``[4, C]`` in float64."""
    R, C = weight.shape
    blocks = ceil_div(C, DRIFT_TILE["BC"])
    split, chunk = pick_split(R, DRIFT_TILE["BR"], blocks, resident_programs(weight.device), max_split=256)
    row_part = torch.empty((blocks, 4, R), dtype=torch.float32, device=weight.device)
    column_part = torch.empty((split, 4, C), dtype=torch.float32, device=weight.device)
    rows = torch.zeros((4, R), dtype=torch.float64, device=weight.device)
    columns = torch.zeros((4, C), dtype=torch.float64, device=weight.device)
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
        combine(row_part, rows, maximum=3)
        combine(column_part, columns, maximum=3)
    return rows, columns
