"""The lerp toward an anchor (op E) as a Triton kernel: two reads and one write, rounded stochastically on the way.

Random bits are a function of a key and of the element's place alone (Philox 4x32-10; Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"): the same on every device, in any order of the programs. The four words of a call
make the 16 bits of each of eight elements.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are compiled by Triton, whose argument types do not exist for mypy.
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rejuv.ops.triton_launch import OPTIONS, on_device, spread

#: Neighbours that a thread holds: one 16-byte load of a half type, and what one call of Philox is enough for. Kernels
#: take it as a default: a constant that they found in the module would be compared at every launch.
NEIGHBOURS = 8
LERP_TILE = {"L": 128, **OPTIONS}
_SMALLEST_NORMAL_HALF = 2.0**-14


@triton.jit
def _eight(a, b, c, d, L: tl.constexpr):
    """Lay four words a lane out as the 16 random bits of eight neighbours, int32 ``[L, 8]``."""
    words = tl.join(tl.join(a, c), tl.join(b, d))
    both = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(both, (L, 8)).to(tl.int32)


@triton.jit
def _cut(value, bits, DROPPED: tl.constexpr, NORMAL: tl.constexpr = _SMALLEST_NORMAL_HALF):
    """Add random low bits to float32 and cut them off; subnormal float16 after a shift that gives them one exponent."""
    low: tl.constexpr = (1 << DROPPED) - 1
    if DROPPED == 16:
        return ((value.to(tl.int32, bitcast=True) + bits) & ~low).to(tl.float32, bitcast=True)
    bits = bits & low
    sign = value.to(tl.int32, bitcast=True) & -0x80000000
    size = tl.abs(value)
    shift = tl.where(size < NORMAL, NORMAL, 0.0)
    moved = (((size + shift).to(tl.int32, bitcast=True) + bits) & ~low).to(tl.float32, bitcast=True) - shift
    return (moved.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _tile(
    param_ptr,
    base_ptr,
    start,
    left,
    share,
    key,
    gap,
    line,
    WHOLE: tl.constexpr,
    NEAR_BASE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DROPPED: tl.constexpr,
    LARGEST: tl.constexpr,
    MEASURE: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr = NEIGHBOURS,
):
    """Lerp the elements from ``start`` on, ``8 * L`` of them or as many as are left, and add to the two sums."""
    lane = tl.arange(0, L)
    at = lane[:, None] * K + tl.arange(0, K)[None, :]
    inside = None if WHOLE else at < left
    x = tl.load(param_ptr + start + at, mask=inside, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(base_ptr + start + at, mask=inside, eviction_policy="evict_first").to(tl.float32)
    way = b - x
    # As torch.lerp: from the nearer end, so that both ends are exact. What does not differ keeps its sign of zero.
    exact = tl.where(way == 0.0, x, b - share * way if NEAR_BASE else x + share * way)
    kind = param_ptr.dtype.element_ty
    result = exact
    if STOCHASTIC:
        group = start // K + lane
        zero = lane * 0
        words = tl.philox(key, group.to(tl.int32), (group >> 32).to(tl.int32), zero, zero)
        bits = _eight(words[0], words[1], words[2], words[3], L)
        result = tl.where(tl.abs(exact) <= LARGEST, _cut(exact, bits, DROPPED), exact)
    elif DROPPED == 16:  # written out, since Triton's interpreter cuts off where the hardware rounds
        bits = 0x7FFF + ((exact.to(tl.int32, bitcast=True) >> 16) & 1)
        result = tl.where(tl.abs(exact) <= LARGEST, _cut(exact, bits, DROPPED), exact)
    stored = result.to(kind)
    tl.store(param_ptr + start + at, stored, mask=inside)
    if MEASURE:
        error = exact - stored.to(tl.float32)
        if not WHOLE:
            way = tl.where(inside, way, 0.0)
            error = tl.where(inside, error, 0.0)
        gap += way * error
        line += way * way
    return gap, line


@triton.jit(do_not_specialize=["N", "steps", "key"])
def lerp_kernel(
    param_ptr,
    base_ptr,
    sums_ptr,
    N,
    share,
    key,
    steps,
    NEAR_BASE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DROPPED: tl.constexpr,
    LARGEST: tl.constexpr,
    MEASURE: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr = NEIGHBOURS,
):
    """Lerp ``steps`` tiles in place, and write ``sums [2, programs]`` float32 of what rounding did to them."""
    program = tl.program_id(0)
    size: tl.constexpr = L * K
    first = program.to(tl.int64) * steps
    whole = tl.minimum(steps, tl.maximum(N // size - first, 0))
    gap = tl.zeros((L, K), tl.float32)
    line = tl.zeros((L, K), tl.float32)
    for step in tl.range(0, whole):
        gap, line = _tile(
            param_ptr, base_ptr, (first + step) * size, size, share, key, gap, line,
            True, NEAR_BASE, STOCHASTIC, DROPPED, LARGEST, MEASURE, L,
        )  # fmt: skip
    start = (first + whole) * size
    if (whole < steps) & (start < N):
        gap, line = _tile(
            param_ptr, base_ptr, start, N - start, share, key, gap, line,
            False, NEAR_BASE, STOCHASTIC, DROPPED, LARGEST, MEASURE, L,
        )  # fmt: skip
    if MEASURE:
        tl.store(sums_ptr + program, tl.sum(tl.sum(gap, 1), 0))
        tl.store(sums_ptr + tl.num_programs(0) + program, tl.sum(tl.sum(line, 1), 0))


def dropped_bits(dtype: torch.dtype) -> int:
    """Return how many of the low bits of a float32 a dtype drops; none for float32."""
    return round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))


def lerp_(param: Tensor, base: Tensor, weight: float, key: int | None) -> Tensor:
    """Lerp a contiguous ``param`` toward a contiguous ``base`` of its size in place.

    Args:
        param: float32, float16 or bfloat16.
        base: of any of these dtypes, on the same device.
        weight: the share of the base, 0 to 1.
        key: of the random bits; None rounds to nearest.

    Returns:
        Partial sums ``[2, programs]`` float32 of ⟨base - param, exact - rounded⟩ and ‖base - param‖²; zeros for
        float32.
    """
    count = param.numel()
    programs, steps = spread(count, LERP_TILE["L"] * NEIGHBOURS, param.device)
    dropped = dropped_bits(param.dtype)
    half = dropped > 0
    sums = torch.empty((2, programs), dtype=torch.float32, device=param.device)
    with on_device(param.device):
        lerp_kernel[(programs,)](
            param,
            base,
            sums,
            count,
            min(weight, 1.0 - weight),
            0 if key is None else key,
            steps,
            NEAR_BASE=weight >= 0.5,
            STOCHASTIC=half and key is not None,
            DROPPED=dropped,
            LARGEST=torch.finfo(param.dtype).max,
            MEASURE=half,
            **LERP_TILE,
        )
    if not param.is_inference():
        torch.autograd.graph.increment_version(param)  # as an edit of PyTorch's own does
    return sums if half else sums.zero_()
