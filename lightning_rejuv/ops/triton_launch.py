"""How the Triton kernels are launched: on which device, and over how many programs."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch

#: What every kernel is compiled with. Fusion of multiply and add is on by default up to Triton 3.9 and off
#: later.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
#: Warps that share a multiprocessor: what 128 registers a thread allow (the compile gate prints them).
WARPS_PER_SM = 16
#: Programs that share a multiprocessor: what 32 registers a thread allow.
TOKEN_PROGRAMS_PER_SM = 16
#: Programs with a step of 4 KiB in flight that saturate the memory: 4.3 TB/s times 0.8 µs, over 132 multiprocessors.
BUSY_PROGRAMS_PER_SM = 7
#: What a program waits for besides its steps, in steps: its launch, the place of the maximum, its results.
STEPS_AROUND = 3
#: Most parts of a row considered.
MOST_PARTS = 64
#: Parts of a row that the merging kernel reads at a time.
PARTS_MERGED = 16
#: Programs a multiprocessor that go through a tensor element by element: several rounds, the last a small part of all.
ELEMENT_PROGRAMS_PER_SM = 32
#: Stands in for the multiprocessors of a device that has none (Triton's interpreter on CPU tensors).
INTERPRETED_SMS = 2


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` current: Triton launches on the current device, not on the device of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def resident_programs(device: torch.device, num_warps: int) -> int:
    """Return how many programs of 128 registers a thread the device holds at a time."""
    return multiprocessors(device) * WARPS_PER_SM // num_warps


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def spread(count: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Spread the elements of a tensor over programs; return how many, and the tiles of each."""
    tiles = ceil_div(count, tile)
    steps = ceil_div(tiles, min(tiles, ELEMENT_PROGRAMS_PER_SM * multiprocessors(device)))
    return ceil_div(tiles, steps), steps


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


@functools.lru_cache(maxsize=4096)
def split_vocabulary(rows: int, length: int, step: int, multiprocessors: int) -> tuple[int, int]:
    """Split rows of ``length`` logits into parts, each a program of its own, so that few rows fill the device too.

    Programs run in rounds of as many as the device holds. A round takes as long as its bytes do at full bandwidth (a
    program's start and end count as one step more), but not less than one program alone, whose every step waits for
    memory once; merging the parts waits as well. The split is taken that takes the least time.

    Args:
        rows: Rows to read.
        length: Logits of a row.
        step: Logits of one step; parts are a multiple of it.
        multiprocessors: Of the device.

    Returns:
        The number of parts of a row and the logits of each.
    """
    resident, busy = multiprocessors * TOKEN_PROGRAMS_PER_SM, multiprocessors * BUSY_PROGRAMS_PER_SM
    steps = ceil_div(length, step)
    best_cost, best = float("inf"), (1, steps * step)
    for split in range(1, min(steps, MOST_PARTS) + 1):
        own = ceil_div(steps, split)
        parts = ceil_div(steps, own)
        rounds, rest = divmod(rows * parts, resident)
        alone = (own + STEPS_AROUND) * busy
        cost = rounds * max((own + 1) * resident, alone) + (max((own + 1) * rest, alone) if rest else 0)
        if parts > 1:
            cost += 2 * ceil_div(parts, PARTS_MERGED) * busy
        if cost < 0.99 * best_cost:
            best_cost, best = cost, (parts, own * step)
    return best
