"""The back end in plain torch, block by block: what a block needs stays in the cache, so the input is read once.

The meaning of every function is its namesake's in ``reference.py``. It serves the CPU, every device without a
kernel of its own, float64 inputs, and CUDA if Triton is not installed. Blocks are summed in float32
(float64 for float64 inputs), in a fixed order, into accumulators that are float64 if the device has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_rejuv.ops._inputs import accumulator_dtype

#: Elements of one block on a CPU: 1 MiB in float32. Half of it misses less, but pays the calls twice as
#: often.
CPU_BLOCK = 1 << 18
#: Elements of one block elsewhere: few launches, and temporaries of at most 64 MiB.
DEVICE_BLOCK = 1 << 24
#: Exponents are clamped here. exp is 0 far earlier, and 0 times this is 0 where 0 times -inf would be NaN.
LOWEST_EXPONENT = -1.0e4
#: Logits whose common maximum is taken before any index is looked for.
SEGMENT = 128


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: small blocks are not worth splitting, and threads that wait for each other spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows_per_block(x: Tensor) -> int:
    return max(1, (CPU_BLOCK if x.device.type == "cpu" else DEVICE_BLOCK) // max(1, x.shape[1]))


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _add_into(accumulator: Tensor, block: Tensor, maximum: int) -> None:
    """Add a block's table to the accumulator, taking the maximum in row ``maximum``."""
    accumulator[:maximum] += block[:maximum]
    torch.maximum(accumulator[maximum], block[maximum].to(accumulator.dtype), out=accumulator[maximum])
    accumulator[maximum + 1 :] += block[maximum + 1 :]


def activation_stats_(accumulator: Tensor, h: Tensor, mask: Tensor | None, eps: float) -> None:
    """Add the statistics of ``h [tokens, N]`` to ``accumulator [7, N]``."""
    step, dtype = _rows_per_block(h), _compute_dtype(h)
    block = torch.empty((7, h.shape[1]), dtype=dtype, device=h.device)
    for start in range(0, h.shape[0], step):
        x = h[start : start + step]
        if mask is not None:
            x = x[mask[start : start + step]]
        if x.shape[0] == 0:
            continue
        x = x.to(dtype)
        a = x.abs()
        torch.sum(a, 0, out=block[0])
        torch.sum(x, 0, out=block[1])
        torch.amax(a, 0, out=block[3])
        # Compared in place: a result of the operands' own dtype is vectorised, a bool is not.
        torch.sum(a.le_(eps), 0, out=block[4])
        torch.sum(a.copy_(x).gt_(0.0), 0, out=block[5])
        torch.sum(torch.mul(x, x, out=a), 0, out=block[2])
        block[6] = x.shape[0]
        _add_into(accumulator, block, maximum=3)


def grad_activation_stats_(accumulator: Tensor, h: Tensor, grad: Tensor, mask: Tensor | None) -> None:
    """Add the gradient × activation statistics of ``h, grad [tokens, N]`` to ``accumulator [4, N]``."""
    step, dtype = _rows_per_block(h), _compute_dtype(h, grad)
    block = torch.empty((4, h.shape[1]), dtype=dtype, device=h.device)
    for start in range(0, h.shape[0], step):
        x, g = h[start : start + step], grad[start : start + step]
        if mask is not None:
            kept = mask[start : start + step]
            x, g = x[kept], g[kept]
        if x.shape[0] == 0:
            continue
        g = g.to(dtype)
        product = g * x.to(dtype)
        torch.sum(product, 0, out=block[2])
        torch.sum(product.abs_(), 0, out=block[0])
        torch.sum(torch.abs(g, out=product), 0, out=block[1])
        block[3] = x.shape[0]
        accumulator += block


def weight_drift(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of the rows ``[4, R]`` and of the columns ``[4, C]``."""
    step, dtype = _rows_per_block(weight), _compute_dtype(weight, base)
    wide = accumulator_dtype(weight.device)
    rows = torch.zeros((4, weight.shape[0]), dtype=wide, device=weight.device)
    columns = torch.zeros((4, weight.shape[1]), dtype=wide, device=weight.device)
    block = torch.empty((4, weight.shape[1]), dtype=dtype, device=weight.device)
    for start in range(0, weight.shape[0], step):
        w, b = weight[start : start + step].to(dtype), base[start : start + step].to(dtype)
        of_rows = rows[:, start : start + step]
        d = w - b
        square = torch.empty_like(d)
        for i, x in enumerate((d, w, b)):
            torch.mul(x, x, out=square)
            torch.sum(square, 0, out=block[i])
            of_rows[i] = square.sum(1)
        torch.amax(d.abs_(), 0, out=block[3])
        of_rows[3] = d.amax(1)
        _add_into(columns, block, maximum=3)
    return rows, columns


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maximum and its lowest index, like ``x.max(1)``.

    A reduction that tracks indices is ten times slower than one that does not, so indices are tracked among the
    maxima of segments, and within the one segment that holds the row's.
    """
    size = x.shape[1]
    whole = size // SEGMENT * SEGMENT
    if whole == 0:
        return x.max(1)
    peaks = x[:, :whole].unflatten(1, (-1, SEGMENT)).amax(2)
    if whole < size:
        peaks = torch.cat([peaks, x[:, whole:].amax(1, keepdim=True)], 1)
    top, segment = peaks.max(1)
    places = segment.unsqueeze(1) * SEGMENT + torch.arange(SEGMENT, device=x.device)
    places.clamp_(max=size - 1)  # the last segment may be short; a repeated last place is never the first
    first = x.gather(1, places).argmax(1, keepdim=True)
    return top, places.gather(1, first).squeeze(1)


def token_partials(
    logits: Tensor,
    target: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor]:
    """Return ``[4, rows]`` (maximum, Σe^u, Σu·e^u, target's logit) and ``[rows]``, the maximum's index."""
    step, dtype = _rows_per_block(logits), _compute_dtype(logits)
    count, size = logits.shape
    sums = torch.empty((4, count), dtype=accumulator_dtype(logits.device), device=logits.device)
    ids = torch.empty(count, dtype=torch.int64, device=logits.device)
    tau = (
        torch.full((count,), temperature, dtype=sums.dtype, device=logits.device)
        if row_temperature is None
        else row_temperature
    )
    tau = tau.to(sums.dtype)
    tau = torch.where(tau > 0, tau, torch.nan)
    for start in range(0, count, step):
        block = slice(start, start + step)
        x = logits[block].to(dtype)
        top, first = _first_maximum(x)
        top.clamp_(min=torch.finfo(torch.float32).min)
        u = x - top.unsqueeze(1)
        if row_temperature is not None or temperature != 1.0:
            u *= tau[block].reciprocal().to(dtype).unsqueeze(1)
        u.clamp_(min=LOWEST_EXPONENT)
        p = u.exp()
        sums[0, block] = top / tau[block]
        sums[1, block] = p.sum(1)
        with torch.autocast(logits.device.type, enabled=False):  # it would round both to half precision
            sums[2, block] = torch.linalg.vecdot(u, p)
        ids[block] = first + vocab_start
        if target is not None:
            local = target[block] - vocab_start
            inside = (local >= 0) & (local < size)
            picked = x.gather(1, torch.where(inside, local, 0).unsqueeze(1)).squeeze(1) / tau[block]
            sums[3, block] = torch.where(inside, picked, torch.nan)
    if target is None:
        sums[3] = torch.nan
    return sums, ids


def merge_token_partials(sums: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``[P, 4, rows]`` and ``[P, rows]`` into ``[4, rows]`` statistics and ``[rows]`` top-1 indices."""
    top, total, weighted, target = sums.unbind(1)
    highest = top.amax(0)
    shift = (top - highest).clamp(min=LOWEST_EXPONENT)
    scale = shift.exp()
    weighted = (scale * (weighted + shift * total)).sum(0)
    total = (scale * total).sum(0)
    log_total = total.log()
    entropy = (log_total - weighted / total).clamp(min=0.0)
    absent = target.isnan()
    chosen = torch.where(absent, 0.0, target).sum(0).where(~absent.all(0), torch.nan)
    stats = torch.stack([entropy, highest + log_total, chosen - highest - log_total, total.reciprocal()])
    first = torch.where(top == highest, ids, torch.iinfo(torch.int64).max).amin(0)
    defined = (total > 0) & total.isfinite()
    return torch.where(defined, stats, torch.nan), torch.where(defined, first, -1)
