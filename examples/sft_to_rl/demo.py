"""The whole story in one command: ``python -m examples.sft_to_rl.demo``.

Pre-trains a small base, over-trains it by SFT, and gives four starting points the same GRPO: the base, a
moderate SFT checkpoint, the excessive one, and the excessive one rejuvenated. Prints a table, writes
``summary.json``, ``report.png`` and TensorBoard events.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# torch, transformers and Lightning are imported by the workers only: this process starts them at once.
TASK_NAMES = ("retail_desk", "running_total")  # the study has one more


@dataclass(frozen=True)
class Job:
    """One seed of one task, as a worker gets it."""

    task: str
    seed: int
    out: Path
    cache: Path
    miniature: bool
    bars: bool


_position = 0


def initialise_worker(lock: Any = None, counter: Any = None) -> None:
    """One thread per process, no denormals; the workers' bars share one lock and get a terminal line each."""
    global _position
    import torch
    from tqdm import tqdm

    from examples.sft_to_rl.training import silence

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    silence()
    if lock is not None:
        tqdm.set_lock(lock)
        with counter.get_lock():
            _position = counter.value
            counter.value += 1


def run_job(job: Job) -> dict[str, Any]:
    """Run one seed in this process."""
    from examples.sft_to_rl.pipeline import run_seed
    from examples.sft_to_rl.settings import Settings
    from examples.sft_to_rl.tasks import get_task
    from examples.sft_to_rl.training import Run

    settings = Settings.miniature() if job.miniature else Settings()
    return run_seed(
        Run(get_task(job.task, job.seed), job.seed, settings, job.out, job.cache, job.bars, _position)
    )


def run_jobs(jobs: Sequence[Job], workers: int) -> list[dict[str, Any]]:
    """Run all jobs, in this process if there is one worker; the first failure stops the demo."""
    if workers == 1:
        initialise_worker()
        return [run_job(job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    shared = (context.RLock(), context.Value("i", 0))
    with ProcessPoolExecutor(workers, context, initialise_worker, shared) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()  # raises with the worker's traceback
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # Not SIGTERM, which Lightning holds on to during a fit: a worker that outlives the others waits for
            # the pool's lock, which an idle one holds to its end, and the demo for the worker.
            for process in multiprocessing.active_children():
                process.kill()
            raise
        return [future.result() for future in futures]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; wrong input ends the demo here, before anything is trained."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.sft_to_rl.demo",
        description="Base, excessive SFT, rejuvenation, GRPO: the same RL from four starting points.",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=None,
        metavar="TASK",
        help=f"of {', '.join(TASK_NAMES)}; default: the first",
    )
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds, default 2")
    parser.add_argument(
        "--first-seed", type=int, default=1, help="the seeds are consecutive from here, default 1"
    )
    parser.add_argument("--full", action="store_true", help="both tasks and 5 seeds, where not given")
    parser.add_argument(
        "--miniature", action="store_true", help="all stages in seconds, without learning anything"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="results, default runs/demo")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/cache"), help="trained bases, default runs/cache"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes, default one per core")
    options = parser.parse_args(arguments)

    options.tasks = options.tasks or list(TASK_NAMES if options.full else TASK_NAMES[:1])
    for task in options.tasks:
        if task not in TASK_NAMES:
            parser.error(f"Expected --tasks to name some of {', '.join(TASK_NAMES)} but got {task!r}.")
    if len(set(options.tasks)) < len(options.tasks):
        parser.error(f"Expected --tasks to name every task once but got {' '.join(options.tasks)}.")
    options.seeds = (5 if options.full else 2) if options.seeds is None else options.seeds
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.workers = cores if options.workers is None else options.workers
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"Expected --{name} to be at least 1 but got {getattr(options, name)}.")
    if options.first_seed < 0:
        parser.error(f"Expected --first-seed to be at least 0 but got {options.first_seed}.")
    for name in ("out", "cache"):
        directory = getattr(options, name)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(
                f"Expected --{name} to be a directory that can be made but got {str(directory)!r}: {error}."
            )
        if not os.access(directory, os.W_OK | os.X_OK):
            parser.error(f"Expected --{name} to be writable but got {str(directory)!r}.")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo and return its summary."""
    options = parse_arguments(arguments)
    started = time.monotonic()
    bars = sys.stderr.isatty()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [
        Job(task, seed, options.out, options.cache, options.miniature, bars)
        for task in options.tasks
        for seed in seeds
    ]
    results = run_jobs(jobs, min(options.workers, len(jobs)))

    from examples.sft_to_rl.report import write_report

    return write_report(results, options.out, options.miniature, time.monotonic() - started)


if __name__ == "__main__":
    main()
