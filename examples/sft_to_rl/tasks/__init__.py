"""The two tasks of the demo."""

from __future__ import annotations

from examples.sft_to_rl.tasks.base import Environment, Outcome, Problems, Recipe, Task
from examples.sft_to_rl.tasks.retail_desk import RetailDesk
from examples.sft_to_rl.tasks.running_total import RunningTotal

TASKS: dict[str, type[Task]] = {"retail_desk": RetailDesk, "running_total": RunningTotal}


def get_task(name: str) -> Task:
    """Build a task by its name.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"Expected `task` to be one of {sorted(TASKS)} but got {name!r}.")
    return TASKS[name]()


__all__ = [
    "TASKS",
    "Environment",
    "Outcome",
    "Problems",
    "Recipe",
    "RetailDesk",
    "RunningTotal",
    "Task",
    "get_task",
]
