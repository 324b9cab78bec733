"""Timing, memory and rooflines of one device, and the table they go to."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Quantiles = tuple[float, float, float]


def installed(package: str) -> str:
    """Return the version of a package, or "none"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


class Bench:
    """Measures variants of an op on one device and collects the rows of the table.

    Args:
        device: "cuda" or "cpu".
        budget: Seconds after which no further variant is started.
        tiny: Whether this run only shows that the script works.
        folder: Where the table goes, after every row anew: a run that is cut off leaves what it has.
        kernels: A folder with other people's kernels.

    Attributes:
        rows: What was measured.
        failures: Cases and variants that raised.
        path: The table, ``folder/ops_<device>.csv``.
    """

    def __init__(
        self, device: str, budget: float, tiny: bool, folder: Path, kernels: Path | None = None
    ) -> None:
        self.kernels = kernels
        self.device, self.budget, self.tiny = device, budget, tiny
        self.path = folder / f"ops_{device}.csv"
        self.failures = 0
        self.cuda = device == "cuda"
        self.started = time.monotonic()
        self.rows: list[dict[str, object]] = []
        self.card = torch.cuda.get_device_name() if self.cuda else platform.processor() or platform.machine()
        self.bytes_per_ms = self._copy_bandwidth()
        self.flops_per_ms = self._matmul_rate()
        print(
            f"{self.card} | {datetime.date.today()} | torch {torch.__version__} | triton {installed('triton')} | "
            f"liger {installed('liger-kernel')} | copy {self.bytes_per_ms / 1e6:.1f} GB/s | matmul "
            f"{self.flops_per_ms / 1e9:.2f} TFLOP/s | {torch.get_num_threads()} CPU thread(s)",
            flush=True,
        )
        print(
            f"{'op':<10s} {'shape':<22s} {'implementation':<32s} {'median ms':>10s} {'p20':>9s} "
            f"{'p80':>9s} {'again':>9s} {'roofline':>8s} {'vs ours':>8s} {'extra MB':>9s} {'first s':>8s}"
        )

    def left(self) -> float:
        """Return the seconds left of the budget."""
        return self.budget - (time.monotonic() - self.started)

    def _copy_bandwidth(self) -> float:
        """Read and write of a tensor far larger than any cache, in bytes a millisecond."""
        source = torch.ones(2**30 if self.cuda else 2**20 if self.tiny else 2**26, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.time(lambda: target.copy_(source))[0]

    def _matmul_rate(self) -> float:
        size, dtype = (8192, torch.bfloat16) if self.cuda else (128 if self.tiny else 1024, torch.float32)
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        return 2 * size**3 / self.time(lambda: a @ a)[0]

    def time(self, run: Callable[[], object], milliseconds: int = 60) -> Quantiles:
        """Return median, 20 % and 80 % quantile in milliseconds; on a GPU the cache is flushed before each run."""
        if self.cuda:
            from triton.testing import do_bench

            return tuple(do_bench(run, warmup=15, rep=milliseconds, quantiles=[0.5, 0.2, 0.8]))
        samples = []
        for _ in range(3 if self.tiny else 7):
            # Seconds of this process alone: on one thread, other programs on the machine do not count.
            start = time.process_time()
            run()
            samples.append(1e3 * (time.process_time() - start))
        cut = statistics.quantiles(samples, n=5, method="inclusive")
        return statistics.median(samples), cut[0], cut[3]

    def extra_memory(self, run: Callable[[], object]) -> float:
        """Return the peak above what was held before, in MB."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        switch = Path("/proc/self/clear_refs")
        if not switch.exists():
            return float("nan")
        switch.write_text("5")  # resets the peak resident size
        before = _resident("VmRSS")
        run()
        return (_resident("VmHWM") - before) / 2**10

    def attempt(self, case: Callable[[], object]) -> None:
        """Run a case while the budget lasts; one that raises must not cost the others."""
        if self.left() < 0:
            return
        try:
            case()
        except Exception:
            self.failures += 1
            traceback.print_exc(file=sys.stdout)
        if self.cuda:
            torch.cuda.empty_cache()

    def case(
        self,
        op: str,
        shape: str,
        read: float,
        variants: Mapping[str, Callable[[], object]],
        flops: float = 0.0,
    ) -> None:
        """Measure the variants of one op; the first is ours. ``read`` is the bytes that must move at least."""
        floor = max(read / self.bytes_per_ms, flops / self.flops_per_ms)
        ours = float("nan")
        for name, run in variants.items():
            if self.left() < 0:
                print(f"{op:<10s} {shape:<22s} {name:<32s} left out: the budget is spent")
                continue
            try:
                start = time.perf_counter()
                run()
                if self.cuda:
                    torch.cuda.synchronize()
                first = time.perf_counter() - start
                median, low, high = self.time(run)
                again = self.time(run, milliseconds=25)[0]
                extra = self.extra_memory(run)
            except Exception as error:  # a variant that fails on this machine must not cost the others
                self.failures += 1
                print(f"{op:<10s} {shape:<22s} {name:<32s} {type(error).__name__}: {str(error)[:300]!r}")
                continue
            if name == next(iter(variants)):
                ours = median
            self.rows.append(
                {
                    "op": op,
                    "shape": shape,
                    "implementation": name,
                    "median_ms": median,
                    "p20_ms": low,
                    "p80_ms": high,
                    "again_ms": again,
                    "floor_ms": floor,
                    "percent_of_roofline": 100 * floor / median,
                    "times_ours": median / ours,
                    "extra_mb": extra,
                    "first_call_s": first,
                }
            )
            self.write()
            print(
                f"{op:<10s} {shape:<22s} {name:<32s} {median:10.3f} {low:9.3f} {high:9.3f} {again:9.3f} "
                f"{100 * floor / median:7.1f}% {median / ours:7.2f}x {extra:9.1f} {first:8.1f}",
                flush=True,
            )

    def write(self) -> None:
        """Write all rows with card, date and versions."""
        if not self.rows:
            return
        where = {
            "card": self.card,
            "date": str(datetime.date.today()),
            "torch": torch.__version__,
            "triton": installed("triton"),
            "copy_gb_s": self.bytes_per_ms / 1e6,
            "matmul_tflop_s": self.flops_per_ms / 1e9,
            "tiny": self.tiny,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            rows = [{**row, **where} for row in self.rows]
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
