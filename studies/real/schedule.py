"""Runs jobs that need each other on several processes, the first that can be run first."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any

from studies.real.jobs import Job


class Here(Executor):
    """Runs what is submitted in this process, at once."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Run it; what it raises is kept for `Future.result`."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def run_jobs(
    jobs: Sequence[Job],
    perform: Callable[[Job], Any],
    executor: Executor,
    workers: int,
    finished: Callable[[Job, Any], None],
) -> dict[Job, str]:
    """Run all jobs.

    Args:
        jobs: In order of importance, what a job needs before it. What is needed but not among them counts as done.
        perform: Runs one job; called in the executor's processes.
        executor: Where to.
        workers: How many jobs are run at the same time.
        finished: Called here with a job and what it returned, before any job that needs it starts.

    Returns:
        Why jobs failed: the traceback, or which job that they need has failed.
    """
    waiting, running = list(jobs), dict[Future[Any], Job]()
    failures: dict[Job, str] = {}
    while waiting or running:
        for job in list(waiting):
            needs = job.needs()
            failed = next((needed for needed in needs if needed in failures), None)
            if failed is not None:
                waiting.remove(job)
                failures[job] = f"{failed.label} failed"
            elif len(running) < workers and not any(
                needed in waiting or needed in running.values() for needed in needs
            ):
                waiting.remove(job)
                running[executor.submit(perform, job)] = job
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            try:
                finished(job, future.result())
            except Exception:
                failures[job] = traceback.format_exc()
                print(f"{job.label} failed:\n{failures[job]}", file=sys.stderr, flush=True)
    return failures
