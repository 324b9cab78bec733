"""The tasks of the demo and of the study."""

from __future__ import annotations

from examples.sft_to_rl.tasks.base import Environment, Outcome, Problems, Questions, Recipe, Task
from examples.sft_to_rl.tasks.price_desk import PriceDesk
from examples.sft_to_rl.tasks.retail_desk import RetailDesk
from examples.sft_to_rl.tasks.running_total import RunningTotal

TASKS: dict[str, type[Task]] = {
    "retail_desk": RetailDesk,
    "running_total": RunningTotal,
    "price_desk": PriceDesk,
}


def get_task(name: str, seed: int = 0) -> Task:
    """Build a task by its name.

    Args:
        name: One of `TASKS`.
        seed: Of what a task draws once: the price list of the price desk.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"Expected `task` to be one of {sorted(TASKS)} but got {name!r}.")
    return PriceDesk(seed) if name == PriceDesk.name else TASKS[name]()


__all__ = [
    "TASKS",
    "Environment",
    "Outcome",
    "PriceDesk",
    "Problems",
    "Questions",
    "Recipe",
    "RetailDesk",
    "RunningTotal",
    "Task",
    "get_task",
]
