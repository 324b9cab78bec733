"""Where the models of the study lie on disk, and which of them can be thrown away."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from studies.real.arms import STARTS
from studies.real.jobs import Job
from studies.real.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class Workspace:
    """The directories of all models. Names hold a digest of what they were trained on.

    Args:
        pretrained: The converted model.
        cache: Where everything else is kept; it can be deleted at any time between two runs.
    """

    pretrained: Path
    cache: Path

    @property
    def knowledge(self) -> Path:
        """The pretrained model's answers to ordinary questions."""
        return self.cache / "knowledge.json"

    def base(self, recipe: Recipe) -> Path:
        """The base of a recipe."""
        if recipe.middle is None:
            return self.pretrained
        return self.cache / f"{recipe.name}-base-{recipe.digest()}"

    def ladder(self, recipe: Recipe, sft_seed: int) -> Path:
        """The checkpoints of one SFT run."""
        return self.cache / f"{recipe.name}-sft-{sft_seed}-{recipe.digest(sft_seed)}"

    def start(self, recipe: Recipe, sft_seed: int, name: str) -> Path:
        """The model that the start `name` of RL is.

        Raises:
            ValueError: The recipe has no such rung.
        """
        start = STARTS[name]
        if start.checkpoint == "base":
            return self.base(recipe)
        ladder = self.ladder(recipe, sft_seed)
        if start.edit is not None:
            return ladder.with_name(f"{ladder.name}-{name}")
        rungs = {"moderate": recipe.moderate, "excessive": recipe.excessive}
        epochs = rungs.get(str(start.checkpoint), start.checkpoint)
        if epochs not in recipe.sft.epochs:
            raise ValueError(
                f"Expected recipe {recipe.name} to write a checkpoint after {epochs} epochs but it does after "
                f"{recipe.sft.epochs}. Leave the start {name!r} out, or add it to the recipe."
            )
        return ladder / f"epoch_{epochs}"

    def is_done(self, job: Job) -> bool:
        """Whether what the job leaves on disk is there, beside the results."""
        if job.kind == "knowledge":
            return self.knowledge.is_file()
        recipe = RECIPES[job.recipe]
        if job.kind == "base":
            return self.base(recipe).is_dir()
        if job.kind == "ladder":
            return self.ladder(recipe, job.sft_seed).is_dir()
        return job.kind == "start" and self.start(recipe, job.sft_seed, job.name).is_dir()

    def throw_away(self, job: Job) -> None:
        """Delete the edited model of a start, 540 MB that a few minutes bring back; never a checkpoint of SFT."""
        if STARTS[job.name].edit is not None:
            shutil.rmtree(self.start(RECIPES[job.recipe], job.sft_seed, job.name), ignore_errors=True)
