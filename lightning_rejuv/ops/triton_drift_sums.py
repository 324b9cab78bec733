"""The sums of which drift and sparsity are made, as a Triton kernel: one read of both tensors, element by element."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are compiled by Triton, whose argument types do not exist for mypy.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rejuv.ops.triton_launch import OPTIONS, on_device, spread

TILE = {"L": 128, "K": 8, "NS": 3, **OPTIONS}


@triton.jit(do_not_specialize=["N", "steps"])
def drift_sums_kernel(
    weight_ptr,
    base_ptr,
    sums_ptr,
    N,
    steps,
    tolerance,
    L: tl.constexpr,
    K: tl.constexpr,
    NS: tl.constexpr,
):
    """Write ``sums [3, programs]`` float32 of ``steps`` tiles: Σ(w − b)², Σb², and how many |w − b| <= tolerance."""
    program = tl.program_id(0)
    at = tl.arange(0, L)[:, None] * K + tl.arange(0, K)[None, :]
    first = program.to(tl.int64) * steps
    whole = tl.minimum(steps, tl.maximum(N // (L * K) - first, 0))
    square = tl.zeros((L, K), tl.float32)
    of_base = tl.zeros((L, K), tl.float32)
    unmoved = tl.zeros((L, K), tl.float32)
    for step in tl.range(0, whole, num_stages=NS):
        start = (first + step) * (L * K)
        b = tl.load(base_ptr + start + at, eviction_policy="evict_first").to(tl.float32)
        d = tl.load(weight_ptr + start + at, eviction_policy="evict_first").to(tl.float32) - b
        square += d * d
        of_base += b * b
        unmoved = tl.where(tl.abs(d) <= tolerance, unmoved + 1.0, unmoved)
    start = (first + whole) * (L * K)
    if (whole < steps) & (start < N):
        inside = at < N - start
        b = tl.load(base_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(weight_ptr + start + at, mask=inside, other=0.0).to(tl.float32) - b
        square += d * d
        of_base += b * b
        unmoved = tl.where(inside & (tl.abs(d) <= tolerance), unmoved + 1.0, unmoved)
    programs = tl.num_programs(0)
    tl.store(sums_ptr + program, tl.sum(tl.sum(square, 1), 0))
    tl.store(sums_ptr + programs + program, tl.sum(tl.sum(of_base, 1), 0))
    tl.store(sums_ptr + 2 * programs + program, tl.sum(tl.sum(unmoved, 1), 0))


def drift_sums(weight: Tensor, base: Tensor, tolerance: float) -> Tensor:
    """Return ``[3]`` float64: Σ(w − b)², Σb² and the number of |w − b| <= tolerance, of two contiguous tensors."""
    count = weight.numel()
    programs, steps = spread(count, TILE["L"] * TILE["K"], weight.device)
    sums = torch.empty((3, programs), dtype=torch.float32, device=weight.device)
    with on_device(weight.device):
        drift_sums_kernel[(programs,)](weight, base, sums, count, steps, tolerance, **TILE)
    return sums.sum(1, dtype=torch.float64)
