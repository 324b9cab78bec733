"""Runs the study: ``python -m studies.run``. Interrupt it at any time; the same command continues.

One process handles one seed of one task at a time, on one thread. An arm or a seed that fails is reported and
does not stop the others. To stop a run in the background, send its process group SIGKILL (Lightning holds on to
SIGTERM in the workers); a task's results are replaced whole after every arm. Bases and SFT checkpoints are
kept under ``--cache``; what is missing there is trained again, to the same weights on the same kind of machine
(the results note a digest of the base, and a seed whose base differs is refused).

What is run by default is the first edition. The second has seeds and results of its own:
``python -m studies.run --groups core frontier remedies --out docs/results/second``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studies.arms import ARMS, MODERATE_EPOCHS
from studies.files import read_seeds
from studies.passes import GROUPS, passes

# torch, transformers and Lightning are imported by the workers only: this process starts them at once.
TASKS = tuple(MODERATE_EPOCHS)


@dataclass(frozen=True)
class Job:
    """Some arms of one seed of one task, as a worker gets them."""

    task: str
    seed: int
    arms: tuple[str, ...]
    out: Path
    cache: Path
    device: str
    model: str
    miniature: bool

    @property
    def label(self) -> str:
        """How the job is called in messages."""
        return f"{self.task} seed {self.seed}"


class Progress:
    """Counts finished arms over all workers.

    Args:
        total: Arms to run.
        counter: A shared integer.
    """

    def __init__(self, total: int, counter: Any) -> None:
        self.total, self.counter, self.started = total, counter, time.time()

    def finished(self, message: str) -> None:
        """Print one line for a finished arm, with an estimate of the time that is left."""
        with self.counter.get_lock():
            self.counter.value += 1
            done = self.counter.value
        minutes = (time.time() - self.started) / done * (self.total - done) / 60
        print(f"[{done}/{self.total}, {minutes:.0f} min left] {message}", flush=True)


_progress: Progress


def initialise_worker(progress: Progress) -> None:
    """One thread, no denormals; what Lightning and transformers would say is left out."""
    global _progress
    import torch

    from examples.sft_to_rl.training import silence

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    silence()
    _progress = progress


def run_job(job: Job) -> None:
    """Run one job in this process."""
    from examples.sft_to_rl.training import Run
    from studies.seed import run_arms
    from studies.sizes import sizes

    task, settings = sizes(job.task, job.model, job.miniature, job.seed)
    run = Run(task, job.seed, settings, job.cache, job.cache, tensorboard=False, device=job.device)
    run_arms(run, job.out, job.arms, _progress.finished)


def _attempt(job: Job) -> tuple[str, str]:
    """The job's label and its traceback, empty where it succeeds."""
    try:
        run_job(job)
    except Exception:
        failure = traceback.format_exc()
        print(f"{job.label} failed:\n{failure}", file=sys.stderr, flush=True)
        return job.label, failure
    return job.label, ""


def run_jobs(passes: Sequence[Sequence[Job]], workers: int) -> dict[str, str]:
    """Run all jobs, in this process if there is one worker; returns the tracebacks of those that failed.

    A pass begins when the one before has ended: no two processes ever work on one seed of one task.
    """
    context = multiprocessing.get_context("spawn")
    arms = sum(len(job.arms) for jobs in passes for job in jobs)
    progress = Progress(arms, context.Value("i", 0))
    if workers == 1:
        initialise_worker(progress)
        return dict(failure for jobs in passes for failure in map(_attempt, jobs) if failure[1])
    failures: dict[str, str] = {}
    with ProcessPoolExecutor(workers, context, initialise_worker, (progress,)) as pool:
        for jobs in passes:
            failures.update(failure for failure in pool.map(_attempt, jobs) if failure[1])
    return failures


def unfinished(job: Job) -> Job:
    """The job without the arms that are there already; results are checked by the worker."""
    done = read_seeds(job.out / f"{job.task}.jsonl").get(job.seed, {"arms": {}})["arms"]
    return replace(job, arms=tuple(arm for arm in job.arms if arm not in done))


def arm_called(name: str) -> str:
    """The arm of this name or of this title, as a page shows them.

    >>> arm_called("sft_64"), arm_called("SFT, 64 epochs"), arm_called("SFT, 64 epochs (`sft_64`)")
    ('sft_64', 'sft_64', 'sft_64')
    """
    own = name.rpartition("(`")[2].removesuffix("`)").strip("`")
    found = [arm for arm, about in ARMS.items() if own == arm or name == about.title]
    if len(found) != 1:
        several = f", of which there are several: {', '.join(found)}" if found else ""
        raise argparse.ArgumentTypeError(f"Expected an arm of studies/arms.py but got {name!r}{several}.")
    return found[0]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.run", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        choices=TASKS,
        metavar="TASK",
        help=f"of {', '.join(TASKS)}",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], help="default: those of each pass, see studies/arms.py"
    )
    parser.add_argument(
        "--groups", nargs="+", default=[], choices=GROUPS, metavar="GROUP", help=f"of {', '.join(GROUPS)}"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[],
        type=arm_called,
        metavar="ARM",
        help="see studies/arms.py; a title does",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, default 2")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--model", default="small", choices=("small", "large"), help="large: 28 M parameters")
    parser.add_argument("--miniature", action="store_true", help="all stages in seconds; nothing is learned")
    parser.add_argument("--out", type=Path, help="results, default docs/results/study, apart for other sizes")
    parser.add_argument("--cache", type=Path, default=Path("runs/study"), help="default runs/study")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"Expected --workers to be at least 1 but got {options.workers}.")
    if options.out is None:
        names = ["study", *(["large"] if options.model == "large" else [])]
        parent = Path("runs/miniature") if options.miniature else Path("docs/results")
        options.out = parent / "-".join(names)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; returns the number of failed jobs."""
    options = parse_arguments(arguments)
    out, cache, device, model = options.out, options.cache, options.device, options.model
    miniature = options.miniature
    jobs = [
        [
            unfinished(Job(task, seed, of_task.arms, out, cache, device, model, miniature))
            for seed in of_tasks[0].seeds
            for task, of_task in zip(options.tasks, of_tasks, strict=True)
        ]
        for of_tasks in zip(
            *(passes(task, options.groups, options.arms, options.seeds) for task in options.tasks),
            strict=True,
        )
    ]
    jobs = [kept for of_pass in jobs if (kept := [job for job in of_pass if job.arms])]
    failures = run_jobs(jobs, options.workers)
    print(f"Done; failed: {', '.join(sorted(failures)) or 'none'}.")
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
