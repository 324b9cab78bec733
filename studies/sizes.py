"""Sizes of the study: the reported one, the large one for a GPU, and the miniature of the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from examples.sft_to_rl.model import Shape
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import RetailDesk, RunningTotal, Task, get_task
from examples.sft_to_rl.tasks.base import Recipe
from studies.noted_desk import NotedDesk

ModelSize = Literal["small", "large"]

NOTED: dict[str, Task] = {task.name: task for task in (NotedDesk(note=32), NotedDesk(note=112))}
LARGER: dict[str, Task] = {"retail_desk": RetailDesk(requests=4), "running_total": RunningTotal(steps=6)}

# 28 M parameters: 8 layers, heads of 64.
LARGE = Shape(width=512, mlp_width=1536, layers=8, heads=8)


def sizes(
    task: str, model: ModelSize = "small", miniature: bool = False, seed: int = 0
) -> tuple[Task, Settings]:
    """The task and the settings of one study.

    Args:
        task: Name of the task.
        model: ``small``, the example's model of 0.1 M parameters; or ``large``, 28 M parameters on longer
            problems: four requests and six steps instead of two and four.
        miniature: All stages in seconds, on the same problems; nothing is learned.
        seed: Of what the task draws once.

    Raises:
        ValueError: If the task has no large problems.
    """
    chosen = NOTED[task] if task in NOTED else get_task(task, seed)
    settings = Settings(id_evaluation=(128, 8), ood_evaluation=(128, 4))
    if model == "large":
        if task not in LARGER:
            raise ValueError(
                f"Expected `task` to be one of {sorted(LARGER)} with a large model but got {task!r}."
            )
        chosen = LARGER[task]
        settings = Settings(id_evaluation=(128, 8), ood_evaluation=(128, 4), shape=LARGE)
    if miniature:
        settings = replace(
            Settings.miniature(),
            responses=32,
            recipe=Recipe(
                (20, 10), decay_steps=10, demonstrations=32, moderate_epochs=8, excessive_epochs=64
            ),
            shape=Shape(width=128, mlp_width=256, layers=4, heads=2) if model == "large" else Shape(),
        )
    return chosen, settings
