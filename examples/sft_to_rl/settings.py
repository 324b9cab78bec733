"""Every size of the demo in one place. Both reported sizes and the miniature of the tests are made here."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.sft_to_rl.model import Shape
from examples.sft_to_rl.tasks.base import Recipe, Task


@dataclass(frozen=True)
class Settings:
    """Sizes of the stages after pre-training, the same for every arm.

    Args:
        rl_steps: GRPO steps.
        prompts: Prompts per GRPO step.
        group: Samples per prompt.
        id_evaluation: Prompts, and samples per prompt, in distribution.
        ood_evaluation: The same out of distribution.
        held_out: Demonstrations held out of SFT, for the calibration and the probe.
        responses: Held-out prompts on which the base is sampled to find alpha.
        recipe: Replaces the task's own recipe.
        shape: Of the model.
    """

    rl_steps: int = 40
    prompts: int = 16
    group: int = 8
    id_evaluation: tuple[int, int] = (192, 8)
    ood_evaluation: tuple[int, int] = (128, 4)
    held_out: int = 64
    responses: int = 96
    recipe: Recipe | None = None
    shape: Shape = field(default_factory=Shape)

    @property
    def rl_budget(self) -> int:
        """Responses that RL samples in each arm."""
        return self.rl_steps * self.prompts * self.group

    def recipe_of(self, task: Task) -> Recipe:
        """The recipe for the base and the SFT ladder of `task`."""
        return self.recipe or task.recipe

    @classmethod
    def miniature(cls) -> Settings:
        """All stages in some seconds. Nothing is learned: it shows that the stages fit together."""
        return cls(
            rl_steps=2,
            prompts=4,
            group=4,
            id_evaluation=(8, 2),
            ood_evaluation=(8, 2),
            held_out=8,
            responses=8,
            recipe=Recipe((20, 10), decay_steps=10, demonstrations=64, moderate_epochs=1, excessive_epochs=4),
        )
