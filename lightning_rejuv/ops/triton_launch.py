"""How the Triton kernels are launched: on which device, and over how many programs."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch

#: What every kernel is compiled with. Fusion of multiply and add is on by default up to Triton 3.9 and off
#: later.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
#: Programs that share a multiprocessor: what 128 registers a thread allow (sm_90; the compile gate prints
#: them).
PROGRAMS_PER_SM = 4
#: Stands in for the multiprocessors of a device that has none (Triton's interpreter on CPU tensors).
INTERPRETED_SMS = 2


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` current: Triton launches on the current device, not on the device of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def resident_programs(device: torch.device) -> int:
    """Return how many programs the device holds at a time."""
    if device.type != "cuda":
        return INTERPRETED_SMS * PROGRAMS_PER_SM
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * PROGRAMS_PER_SM


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def pick_split(length: int, unit: int, columns: int, resident: int, max_split: int = 64) -> tuple[int, int]:
    """Split a loop of ``length`` into parts for ``columns`` independent column blocks.

    Programs run in rounds of ``resident``. A last round that is nearly empty costs as much as a full one (560
    programs on 528 slots run at 53 %), so the split is taken that needs the fewest steps over all rounds,
    each part also paying for the partial results it writes. The result depends on the device's size: float32
    partial sums are bitwise repeatable on one kind of device, not across kinds.

    Args:
        length: Rows to go through.
        unit: Rows of one step; parts are a multiple of it.
        columns: Column blocks, each a program of its own.
        resident: Programs the device holds at a time.
        max_split: Most parts considered.

    Returns:
        The number of parts and the rows of each.
    """
    best_cost, best = float("inf"), (1, length)
    for split in range(1, max_split + 1):
        chunk = ceil_div(ceil_div(length, split), unit) * unit
        parts = ceil_div(length, chunk)
        rounds = ceil_div(columns * parts, resident)
        partial_traffic = 1.0 + 12.0 * parts / length
        cost = rounds * chunk * partial_traffic
        if cost < 0.999 * best_cost:
            best_cost, best = cost, (parts, chunk)
        if chunk == unit:
            break
    return best
