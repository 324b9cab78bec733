"""Measures the memory of a fusion: ``python -m tests.weights.fusion_memory fsdp2 float32``."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_rejuv import rejuvenate
from tests.processes import run_in_processes

LAYERS = 8


def anonymous() -> float:
    """Megabytes of this process that are no file's: a memory-mapped base does not count."""
    line = next(
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon")
    )
    return int(line.split()[1]) / 1024


def growth_during(function):
    """The most megabytes that were in use during a call, beyond those before it."""
    before, peak, done = anonymous(), [0.0], threading.Event()

    def look():
        while not done.wait(0.0005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return peak[0] - before


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False, dtype=dtype) for _ in range(LAYERS)))


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model):
    wrap = ModuleWrapPolicy({nn.Linear})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=wrap, use_orig_params=True, device_id=torch.device("cpu")
    )


SHARDS = {"whole": lambda model: model, "fsdp2": fsdp2, "fsdp1": fsdp1}


def measure(layout, dtype):
    """Megabytes, for each process."""
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory) / "base.safetensors"
        save_file({name: 0.9 * p.detach() for name, p in net(dtype).named_parameters()}, base)

        def fuse(rank):
            model = SHARDS[layout](net(dtype))
            # The first call leaves behind what every first call leaves: threads, buffers of the collectives.
            rejuvenate(model, base, alpha=0.9)
            return growth_during(lambda: rejuvenate(model, base, alpha=0.5))

        return run_in_processes(fuse, Path(directory), 1 if layout == "whole" else 2)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], getattr(torch, sys.argv[2]))))
