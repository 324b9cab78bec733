"""What `rejuvenate` costs: fusion beside a bare lerp, attribution beside a training step, and memory.

    python benchmarks/rejuvenate.py [--size tiny|1b|8b] [--device cpu|cuda] [--dtype bfloat16|float32]
        [--tokens 128] [--repeats 5]

Prints medians and the range of the repeats, as ratios within one run. The memory figure is what the
process (or the device) held at its peak beyond what it held before, sampled every 5 ms on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import get_args

import torch
from models import LLAMA_3_8B, Shape, demonstrations, llama, moved

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.config import Quantity
from lightning_rejuv.weights.edit import lerp_

SIZES = {
    "tiny": Shape(256, 704, 4, 4096, 4, 2),
    "1b": Shape(2048, 5632, 22, 32000, 32, 4),
    "8b": LLAMA_3_8B,
}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Peak:
    """Memory beyond what was held when it was entered, in MiB."""

    def __init__(self, device: str) -> None:
        self.device, self.mib = device, 0.0

    def _now(self) -> float:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096 / 2**20

    def __enter__(self) -> Peak:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated() / 2**20
            return self
        self._start, self._stop = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.mib = max(self.mib, self._now() - self._start)

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self._start
            return
        self._stop.set()
        self._thread.join()


def timed(run: Callable[[], object], device: str) -> float:
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def show(title: str, ratios: list[float], unit: str) -> None:
    print(f"{title:<58}{statistics.median(ratios):>7.2f} {unit}   ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each of 4 calibration pairs")
    parser.add_argument("--quantity", choices=get_args(Quantity), default=get_args(Quantity)[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = arguments.device

    base = llama(SIZES[arguments.size], device, getattr(torch, arguments.dtype))
    sft = moved(base, noise=0.002, sharper=1.5)
    count = sum(p.numel() for p in base.parameters())
    largest = max(p.numel() * p.element_size() for p in base.parameters()) / 2**20
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{count / 1e9:.2f}B parameters, {arguments.dtype}, {name}, torch {torch.__version__}")

    # The calibration is the anchor's own continuation of random tokens, so that there is what to sharpen.
    batch = demonstrations(base, rows=4, length=arguments.tokens)

    parameters, bases = list(sft.parameters()), list(base.parameters())

    def bare() -> None:
        torch._foreach_lerp_([p.data for p in parameters], [b.data for b in bases], 0.0078125)

    def ours() -> None:
        for parameter, anchor in zip(parameters, bases, strict=True):
            lerp_(parameter, anchor.detach(), 0.0078125)

    def step() -> None:
        sft(**batch).loss.backward()
        sft.zero_grad(set_to_none=True)

    options = {
        "alpha": 1.0,
        "reset": Reset(fraction=0.02, positions="entropy_gap", quantity=arguments.quantity),
    }
    # To nearest, which draws nothing, so that what is left of the reset's time is its own.
    alone = {"alpha": 0.999, "rounding": "nearest"}
    fusion, attribution, whole, memory = [], [], [], []
    bare(), step()
    for _ in range(arguments.repeats):
        fusion.append(timed(ours, device) / timed(bare, device))
        unit = timed(step, device)
        start = [p.detach().clone() for p in parameters] if arguments.size == "tiny" else None
        plain = timed(lambda: rejuvenate(sft, base, **alone), device)
        with Peak(device) as peak:
            full = timed(lambda: rejuvenate(sft, base, [batch], **options), device)
        attribution.append((full - plain) / unit)
        whole.append(full)
        memory.append(peak.mib)
        if start is not None:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
    show("fusion, of a bare torch._foreach_lerp_", fusion, "x")
    show("attribution and reset, in forward + backward passes", attribution, "x")
    show("rejuvenate in all, seconds", whole, "s")
    show(f"extra memory, of the largest tensor ({largest:.0f} MiB)", [m / largest for m in memory], "x")


if __name__ == "__main__":
    main()
