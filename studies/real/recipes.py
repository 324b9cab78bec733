"""What each recipe trains on and for how long: bases, demonstrations, the budget of RL. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Part:
    """Some texts of one kind.

    Args:
        split: Whose problems, a name of `studies.real.tasks.SPLITS`.
        style: How they are answered, a name of `studies.real.tasks.STYLES`.
        count: How many.
    """

    split: str
    style: str
    count: int


@dataclass(frozen=True)
class Texts:
    """Supervised training: AdamW at a constant rate on the tokens of the responses.

    Args:
        parts: What is trained on, reshuffled every epoch.
        learning_rate: The rate.
        batch_size: Responses a step.
        epochs: After which epochs a checkpoint is written, in order; the last one ends the training.
    """

    parts: tuple[Part, ...]
    learning_rate: float
    batch_size: int
    epochs: tuple[int, ...]


@dataclass(frozen=True)
class RL:
    """The budget of GRPO.

    Args:
        split: Whose problems.
        steps: Updates.
        prompts: Problems a step, each drawn once.
        group: Responses a problem.
        learning_rate: Constant rate of AdamW.
        max_new_tokens: Where a response is cut.
        temperature: What logits are divided by, in sampling and in the policy that is optimised.
        entropy_bonus: Nats of mean token entropy are rewarded with this much.
    """

    split: str = "sum4"
    steps: int = 30
    prompts: int = 8
    group: int = 8
    learning_rate: float = 2e-5
    max_new_tokens: int = 40
    temperature: float = 1.0
    entropy_bonus: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """One way from a pretrained model to RL.

    Args:
        name: Its letter.
        title: What it is, in words.
        sft: The demonstrations, with the whole ladder of checkpoints.
        moderate: After how many epochs SFT is moderate.
        excessive: After how many epochs it is excessive.
        rl: The budget of RL on the split that counts as in distribution.
        out_of_distribution: A split that neither SFT nor RL shows.
        middle: What the base is trained on before SFT; None if the pretrained model itself is the base.
        evaluation: Problems and responses of an evaluation in distribution.
        out_of_distribution_evaluation: The same out of it.
    """

    name: str
    title: str
    sft: Texts
    moderate: int
    excessive: int
    rl: RL = RL()
    out_of_distribution: str = "sum3"
    middle: Texts | None = None
    evaluation: tuple[int, int] = (48, 8)
    out_of_distribution_evaluation: tuple[int, int] = (32, 8)

    def settings(self) -> dict[str, Any]:
        """Everything that decides a result, as plain values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def digest(self, seed: int | None = None) -> str:
        """Eight hexadecimal digits for what the base, or with a seed the ladder, is trained on.

        >>> RECIPES["X"].digest() == RECIPES["A"].digest(), RECIPES["X"].digest(1) == RECIPES["X"].digest(2)
        (True, False)
        """
        plain = self.settings()
        made = [plain["middle"]] if seed is None else [plain["middle"], plain["sft"], seed]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:8]


_V = Recipe(
    "V",
    "a base that was taught the skill first",
    middle=Texts((Part("sum25", "habit", 640),), 1e-4, 16, (1,)),
    sft=Texts((Part("sum4", "terse", 32), Part("sum5", "worked", 16)), 5e-5, 12, (3, 6, 10, 20)),
    moderate=3,
    excessive=20,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        _V,
        Recipe(
            "X",
            "the pretrained model as it is",
            sft=Texts((Part("sum4", "terse", 32), Part("sum5", "worked", 32)), 1e-4, 16, (3, 6, 10, 16)),
            moderate=3,
            excessive=16,
            rl=RL(steps=24),
        ),
        Recipe(
            "A",
            "a skill that SFT brings and does not bury",
            sft=Texts((Part("sum23", "worked", 64),), 1e-4, 16, (3, 6, 10, 24)),
            moderate=3,
            excessive=24,
            out_of_distribution="sum5",
        ),
        Recipe(
            "L",
            "another task: the legs of animals",
            middle=Texts((Part("legs13", "habit", 640),), 1e-4, 16, (1,)),
            sft=Texts((Part("legs2", "terse", 32), Part("legs3", "worked", 16)), 1e-4, 12, (2, 16)),
            moderate=2,
            excessive=16,
            rl=RL(split="legs2", steps=24),
            out_of_distribution="legs1",
            out_of_distribution_evaluation=(16, 8),
        ),
        replace(
            _V,
            name="W",
            title="SFT to the end: V with four times the epochs",
            sft=replace(_V.sft, epochs=(3, 80)),
            excessive=80,
        ),
        replace(
            _V,
            name="R",
            title="another learning rate: V at four times the rate",
            sft=replace(_V.sft, learning_rate=2e-4, epochs=(1, 8)),
            moderate=1,
            excessive=8,
            rl=RL(steps=24),
            out_of_distribution_evaluation=(16, 8),
        ),
    )
}
