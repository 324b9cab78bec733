"""Runs the study on a real model: ``python -m studies.real.run``. The same command continues where it was cut off.

One process does one job at a time, on one thread. An arm that fails is reported and does not stop the others. Results
are written by this process alone, a whole file after every job. To stop a run in the background, send its process
group SIGKILL (Lightning holds on to SIGTERM in the workers).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from studies.real.arms import ARMS
from studies.real.jobs import Job, arm_jobs, with_needs
from studies.real.recipes import RECIPES
from studies.real.record import Record
from studies.real.schedule import Here, run_jobs
from studies.real.seeds import RL_SEEDS, SFT_SEEDS
from studies.real.workspace import Workspace

# torch, transformers and Lightning are imported by the workers only.
_stages: Any


def prepared(workspace: Workspace, out: Path, device: str) -> Any:
    """Set this process up and return its stages: one thread, no denormals, silent Lightning and transformers."""
    import torch

    from examples.sft_to_rl.training import silence
    from studies.real.stages import Stages

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    silence()
    return Stages(workspace, out, device)


def initialise_worker(workspace: Workspace, out: Path, device: str) -> None:
    """Set a worker up."""
    global _stages
    _stages = prepared(workspace, out, device)


def perform(job: Job) -> Any:
    """Do one job in this process."""
    return _stages.perform(job)


class Book:
    """What is done, and what happens when a job has finished.

    Args:
        arms: The arms that are asked for.
        workspace: Where models lie.
        out: Directory of the results.

    Raises:
        ValueError: Results are there that other settings made.
    """

    def __init__(self, arms: Sequence[Job], workspace: Workspace, out: Path) -> None:
        self.workspace = workspace
        self.records = {
            (job.recipe, job.sft_seed): Record(out, RECIPES[job.recipe], job.sft_seed) for job in arms
        }
        self.remaining = [job for job in arms if not self._record(job).has(job)]
        self.jobs = with_needs(self.remaining, self.done)
        self.total, self.finished_jobs, self.started = len(self.jobs), 0, time.time()

    def _record(self, job: Job) -> Record:
        return self.records[job.recipe, job.sft_seed]

    def _is_needed(self, start: Job) -> bool:
        return any(start in arm.needs() for arm in self.remaining)

    def done(self, job: Job) -> bool:
        """Whether there is nothing to do: results are there, and so is the model if an arm starts from it."""
        if job.kind == "arm":
            return self._record(job).has(job)
        if job.kind == "start" and not self._record(job).has(job):
            return False
        return self.workspace.is_done(job) or (job.kind == "start" and not self._is_needed(job))

    def finished(self, job: Job, result: dict[str, Any] | None) -> None:
        """Write a result, delete a model that no arm needs any more, and print one line."""
        if result is not None and not self._record(job).has(job):
            self._record(job).add(job, result)
        elif result is not None and job.kind == "start":
            _say_if_another(job, self._record(job).start(job.name)["id"], result["id"])
        if job.kind in ("start", "arm"):
            self.remaining = [arm for arm in self.remaining if arm != job]
            start = job if job.kind == "start" else job.needs()[0]
            if not self._is_needed(start):
                self.workspace.throw_away(start)
        self.finished_jobs += 1
        left = (time.time() - self.started) / self.finished_jobs * (self.total - self.finished_jobs) / 60
        print(
            f"[{self.finished_jobs}/{self.total}, {left:.0f} min left] {job.label}{_said(result)}", flush=True
        )


def _say_if_another(start: Job, first: dict[str, float], again: dict[str, float]) -> None:
    """Say that a start which was deleted and made again, by another library or machine, became another model."""
    if first != again:
        print(
            f"{start.label} is not what was measured when it was made first: then {first}, now {again}. Arms that "
            "start from it now have another start than those before.",
            file=sys.stderr,
            flush=True,
        )


def _said(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    inside, outside = (f"{result[split]['pass_at_1']:.2f}" for split in ("id", "ood"))
    return f": pass@1 {inside}, out of distribution {outside}; {result['seconds']:.0f} s"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.real.run", description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["V", "X"], choices=RECIPES, help="default V X")
    parser.add_argument("--seeds", nargs="+", type=int, default=SFT_SEEDS, help="of SFT, default 101 102 103")
    parser.add_argument("--rl-seeds", nargs="+", type=int, default=RL_SEEDS, help="of RL, default 201 202")
    parser.add_argument(
        "--arms", nargs="+", default=[], choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}"
    )
    parser.add_argument("--workers", type=int, help="processes, default one per core, 16 at most")
    add_places(parser, Path("docs/results/real"))
    options = parser.parse_args(arguments)
    if options.workers is None:
        options.workers = min(16, len(os.sched_getaffinity(0)))
    if options.workers < 1:
        parser.error(f"Expected --workers to be at least 1 but got {options.workers}.")
    check_base(parser, options)
    return options


def add_places(parser: argparse.ArgumentParser, out: Path) -> None:
    """Add the options that say where things lie and what computes."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--out", type=Path, default=out, help=f"default {out}")
    parser.add_argument("--cache", type=Path, default=Path("runs/real"), help="models, default runs/real")
    parser.add_argument("--base", type=Path, help="the pretrained model, default pretrained in the cache")


def check_base(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in where the pretrained model lies, and end with a message if it does not."""
    options.base = options.base or options.cache / "pretrained"
    if not (options.base / "config.json").is_file():
        parser.error(
            f"Expected a model in {str(options.base)!r}. Run `make study-real-model`, or name --base."
        )


def _executor(workers: int, arguments: tuple[Workspace, Path, str]) -> Executor:
    if workers == 1:
        initialise_worker(*arguments)
        return Here()
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initialise_worker, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; returns the number of failed jobs."""
    options = parse_arguments(arguments)
    workspace = Workspace(options.base, options.cache)
    arms = arm_jobs(options.recipes, options.seeds, options.rl_seeds, options.arms)
    book = Book(arms, workspace, options.out)
    workers = min(options.workers, max(1, len(book.jobs)))
    with _executor(workers, (workspace, options.out, options.device)) as executor:
        failures = run_jobs(book.jobs, perform, executor, workers, book.finished)
    print(f"Done; failed: {', '.join(job.label for job in failures) or 'none'}.")
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
