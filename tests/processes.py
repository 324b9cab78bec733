"""Run a function in some gloo processes: forked, so that closures travel and it takes a tenth of a second."""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _work(function: Callable[[int], Any], rank: int, size: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
        results.put((rank, function(rank), None))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def run_in_processes(function: Callable[[int], Any], tmp_path: Path, size: int = 2) -> list[Any]:
    """Return all ranks' results (anything but tensors, which would need shared memory)."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    store = str(tmp_path / "store")
    processes = [
        context.Process(target=_work, args=(function, rank, size, store, results)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=60) for _ in processes]
    except queue.Empty as error:
        raise TimeoutError("the processes wait for each other: a collective is missing on one") from error
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.terminate()
    failures = [error for _, _, error in found if error]
    assert not failures, "\n".join(failures)
    return [result for _, result, _ in sorted(found, key=lambda entry: entry[0])]
