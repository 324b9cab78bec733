"""Token statistics (op D) as Triton kernels: a lane-wise online softmax in one read of the logits, then a merge.

Every lane keeps its own maximum, Σe^u and Σu·e^u, so the loop needs no exchange between threads; exponents
are powers of two because the hardware's are. Sentinels are finite, so that -inf never meets -inf and NaN
stays visible.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are compiled by Triton, whose argument types do not exist for mypy.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rejuv.ops.triton_launch import (
    OPTIONS,
    PARTS_MERGED,
    ceil_div,
    multiprocessors,
    on_device,
    split_vocabulary,
)

# Kernels take these as defaults: constants that they found in the module would be compared at every launch.
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
#: The lowest finite float32: below every logit but -inf.
LOWEST = -3.4028234663852886e38
#: Exponents are clamped here. 2^x is 0 far earlier, and 0 times this is 0 where 0 times -inf would be NaN.
LOWEST_EXPONENT = -1.0e4
NOWHERE = 2**31 - 1
NO_ID = 2**63 - 1

#: Tile [L, K]: the K neighbours of a lane make one 16-byte load.
ALIGNED_LANES = 256
MERGE_TILE = {"BP": PARTS_MERGED, "BM": 32, **OPTIONS}


@triton.jit
def _update(top, total, weighted, place, x, start, c, LOWEST_EXPONENT: tl.constexpr = LOWEST_EXPONENT):
    """Add one tile of logits to the lanes' running maximum, Σ2^u and Σu·2^u, u = (x − maximum)·c.

    ``start`` is where a lane's logits of this tile begin, and ``place`` where those begin that hold its maximum.
    """
    peak = tl.max(x, 1)
    place = tl.where(peak > top, start, place)
    new = tl.maximum(top, peak)
    u = tl.maximum((x - new[:, None]) * c, LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(u)
    shift = tl.maximum((top - new) * c, LOWEST_EXPONENT)
    scale = tl.exp2(shift)
    weighted = scale * (weighted + shift * total) + tl.sum(u * p, 1)
    total = scale * total + tl.sum(p, 1)
    return new, total, weighted, place


@triton.jit
def _load(base, at, stride_v, low, high):
    """Load the logits at the positions ``at`` that lie from ``low`` up to ``high``; -inf elsewhere."""
    x = tl.load(base + at.to(tl.int64) * stride_v, mask=(at >= low) & (at < high), other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _first(base, at, stride_v, low, high, value, NOWHERE: tl.constexpr = NOWHERE):
    """Return the first of the positions that holds ``value``."""
    return tl.min(tl.where(_load(base, at, stride_v, low, high) == value, at, NOWHERE), 0)


@triton.jit(do_not_specialize=["M", "V", "stride_m", "lead", "vocab_start"])
def token_partials_kernel(
    x_ptr,
    target_ptr,
    tau_ptr,
    part_ptr,
    id_ptr,
    M,
    V,
    stride_m,
    stride_v,
    lead,
    chunk,
    temperature,
    vocab_start,
    HAS_TARGET: tl.constexpr,
    HAS_TAU: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
    LN2: tl.constexpr = LN2,
    LOWEST: tl.constexpr = LOWEST,
    LOWEST_EXPONENT: tl.constexpr = LOWEST_EXPONENT,
    NOWHERE: tl.constexpr = NOWHERE,
):
    """Write ``part [S, 4, M]`` and ``id [S, M]`` of one row's part of the vocabulary, grid (M, S).

    Where neighbours in memory are neighbours in the row (``CONTIGUOUS``), positions count from the 16-byte boundary
    at or below the start of the row, ``skew`` elements before it: every whole tile is then read by 16-byte loads,
    wherever the row starts. ``lead`` is the distance of ``x_ptr`` from such a boundary, in elements.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    offset = row * stride_m
    if CONTIGUOUS:
        skew = ((lead + offset) % K).to(tl.int32)
        base = tl.multiple_of(x_ptr + (offset - skew), 16)
    else:
        skew = 0
        base = x_ptr + offset
    if HAS_TAU:  # noqa: SIM108  a branch that Triton drops
        tau = tl.load(tau_ptr + row)
    else:
        tau = temperature
    inverse = 1.0 / tl.where(tau > 0, tau, float("nan"))
    c = inverse * LOG2E
    lane = tl.arange(0, L) * K
    inner = tl.arange(0, K)[None, :]
    single = tl.arange(0, L)[:, None]
    first = part * chunk
    last = tl.minimum(first + chunk, V + skew)
    top = tl.full((L,), LOWEST, tl.float32)
    total = tl.zeros((L,), tl.float32)
    weighted = tl.zeros((L,), tl.float32)
    place = tl.zeros((L,), tl.int32) + first
    # What lies before the first boundary in the row, and behind the last, is read one logit a lane.
    begin = first
    if first < skew:
        x = _load(base, first + single, stride_v, skew, tl.minimum(first + K, last))
        top, total, weighted, place = _update(top, total, weighted, place, x, first, c)
        begin += K
    # A part may be empty: the launcher makes room for the largest skew.
    whole = begin + tl.maximum(last - begin, 0) // (L * K) * (L * K)
    for start in range(begin, whole, L * K):
        lanes = tl.multiple_of(start, K) + lane
        at = lanes[:, None] + inner
        x = tl.load(base + at.to(tl.int64) * stride_v).to(tl.float32)
        top, total, weighted, place = _update(top, total, weighted, place, x, lanes, c)
    rest = tl.maximum(last // K * K, begin)
    if whole < rest:
        lanes = tl.multiple_of(whole, K) + lane
        at = lanes[:, None] + inner
        x = _load(base, at, stride_v, 0, tl.multiple_of(rest, K))
        top, total, weighted, place = _update(top, total, weighted, place, x, lanes, c)
    if rest < last:
        x = _load(base, rest + single, stride_v, rest, last)
        top, total, weighted, place = _update(top, total, weighted, place, x, rest, c)
    highest = tl.max(top, 0)
    shift = tl.maximum((top - highest) * c, LOWEST_EXPONENT)
    scale = tl.exp2(shift)
    weighted = tl.sum(scale * (weighted + shift * total), 0)
    total = tl.sum(scale * total, 0)
    # Where the first lane that holds the maximum has it: what the lane read there is read again.
    where = tl.min(tl.where(top == highest, place, NOWHERE), 0)
    top1 = _first(base, where + tl.arange(0, K), stride_v, skew, last, highest)
    if (highest == LOWEST) & (total > 0):  # no logit was above what the lanes start with: none kept a place
        for start in range(first, last, L):
            top1 = tl.minimum(top1, _first(base, start + tl.arange(0, L), stride_v, skew, last, highest))
    wide = part_ptr.dtype.element_ty
    out = part_ptr + part.to(tl.int64) * 4 * M + row
    tl.store(out, highest.to(wide) * inverse.to(wide))
    tl.store(out + M, total.to(wide))
    tl.store(out + 2 * M, (weighted * LN2).to(wide))
    tl.store(id_ptr + part.to(tl.int64) * M + row, (top1 - skew).to(tl.int64) + vocab_start)
    if HAS_TARGET:
        at = tl.load(target_ptr + row) - vocab_start + skew
        inside = (at >= first) & (at >= skew) & (at < last)
        y = tl.load(base + at * stride_v, mask=inside, other=float("nan")).to(wide)
        tl.store(out + 3 * M, y * inverse.to(wide))
    else:
        tl.store(out + 3 * M, tl.full((), float("nan"), wide))


@triton.jit(do_not_specialize=["P", "M"])
def merge_kernel(
    part_ptr,
    id_ptr,
    out_ptr,
    out_id_ptr,
    P,
    M,
    FINAL: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    LOWEST_EXPONENT: tl.constexpr = LOWEST_EXPONENT,
    NO_ID: tl.constexpr = NO_ID,
):
    """Merge ``part [P, 4, M]``, ``id [P, M]`` into a partial or ``FINAL`` statistics. Grid (row blocks,)."""
    wide = part_ptr.dtype.element_ty
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    in_rows = rows < M
    highest = tl.full((BM,), float("-inf"), wide)
    for p in range(0, P, BP):
        parts = p + tl.arange(0, BP)
        inside = (parts < P)[:, None] & in_rows[None, :]
        at = parts.to(tl.int64)[:, None] * 4 * M + rows[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(part_ptr + at, mask=inside, other=float("-inf")), 0))
    total = tl.zeros((BM,), wide)
    weighted = tl.zeros((BM,), wide)
    target = tl.zeros((BM,), wide)
    found = tl.zeros((BM,), tl.int32)
    place = tl.full((BM,), NO_ID, tl.int64)
    for p in range(0, P, BP):
        parts = p + tl.arange(0, BP)
        inside = (parts < P)[:, None] & in_rows[None, :]
        at = parts.to(tl.int64)[:, None] * 4 * M + rows[None, :]
        top = tl.load(part_ptr + at, mask=inside, other=float("-inf"))
        d = tl.load(part_ptr + at + M, mask=inside, other=0.0)
        s = tl.load(part_ptr + at + 2 * M, mask=inside, other=0.0)
        y = tl.load(part_ptr + at + 3 * M, mask=inside, other=float("nan"))
        ids = tl.load(id_ptr + parts.to(tl.int64)[:, None] * M + rows[None, :], mask=inside, other=NO_ID)
        shift = tl.maximum(top - highest[None, :], LOWEST_EXPONENT)
        scale = tl.exp(shift)
        weighted += tl.sum(scale * (s + shift * d), 0)
        total += tl.sum(scale * d, 0)
        target += tl.sum(tl.where(y == y, y, 0.0), 0)
        found += tl.sum((y == y).to(tl.int32), 0)
        place = tl.minimum(place, tl.min(tl.where(top == highest[None, :], ids, NO_ID), 0))
    nan = tl.full((BM,), float("nan"), wide)
    target = tl.where(found > 0, target, nan)
    if FINAL:
        defined = (total > 0) & (total < float("inf"))
        log_total = tl.log(tl.where(defined, total, 1.0))
        entropy = tl.maximum(log_total - weighted / total, 0.0)
        tl.store(out_ptr + rows, tl.where(defined, entropy, nan), mask=in_rows)
        tl.store(out_ptr + M + rows, tl.where(defined, highest + log_total, nan), mask=in_rows)
        tl.store(out_ptr + 2 * M + rows, tl.where(defined, target - highest - log_total, nan), mask=in_rows)
        tl.store(out_ptr + 3 * M + rows, tl.where(defined, 1.0 / total, nan), mask=in_rows)
        place = tl.where(defined, place, -1)
    else:
        tl.store(out_ptr + rows, highest, mask=in_rows)
        tl.store(out_ptr + M + rows, total, mask=in_rows)
        tl.store(out_ptr + 2 * M + rows, weighted, mask=in_rows)
        tl.store(out_ptr + 3 * M + rows, target, mask=in_rows)
    tl.store(out_id_ptr + rows, place, mask=in_rows)


def logits_tile(logits: Tensor) -> dict[str, int | bool]:
    """Return the tile that suits the dtype and the strides."""
    contiguous = logits.stride(1) == 1
    return {"CONTIGUOUS": contiguous, "L": ALIGNED_LANES, "K": 16 // logits.element_size(), **OPTIONS}


def _merge(sums: Tensor, ids: Tensor, final: bool) -> tuple[Tensor, Tensor]:
    parts, _, rows = sums.shape
    out = torch.empty((4, rows), dtype=sums.dtype, device=sums.device)
    out_id = torch.empty((rows,), dtype=ids.dtype, device=ids.device)
    if rows > 0:
        grid = (ceil_div(rows, MERGE_TILE["BM"]),)
        merge_kernel[grid](sums, ids, out, out_id, parts, rows, FINAL=final, **MERGE_TILE)
    return out, out_id


def token_partials(
    logits: Tensor,
    target: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor]:
    """Return ``[4, M]`` float64 (maximum, Σe^u, Σu·e^u, target's logit) and ``[M]``, the maximum's index."""
    rows, vocabulary = logits.shape
    tile = logits_tile(logits)
    length = vocabulary + tile["K"] - 1  # with the largest skew
    step = tile["L"] * tile["K"]
    split, chunk = split_vocabulary(rows, length, step, multiprocessors(logits.device))
    several = (split,) if split > 1 else ()
    sums = torch.empty((*several, 4, rows), dtype=torch.float64, device=logits.device)
    ids = torch.empty((*several, rows), dtype=torch.int64, device=logits.device)
    if rows == 0:
        return sums, ids
    with on_device(logits.device):
        token_partials_kernel[(rows, split)](
            logits,
            ids if target is None else target,
            logits if row_temperature is None else row_temperature,
            sums,
            ids,
            rows,
            vocabulary,
            *logits.stride(),
            logits.data_ptr() % 16 // logits.element_size(),
            chunk,
            temperature,
            vocab_start,
            HAS_TARGET=target is not None,
            HAS_TAU=row_temperature is not None,
            **tile,
        )
        return (sums, ids) if split == 1 else _merge(sums, ids, final=False)


def merge_token_partials(sums: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``[P, 4, M]`` and ``[P, M]`` into ``[4, M]`` statistics and ``[M]`` top-1 indices."""
    with on_device(sums.device):
        return _merge(sums.contiguous(), ids.contiguous(), final=True)
