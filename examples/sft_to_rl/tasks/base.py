"""What a task must offer: documents to learn from, problems to solve, an environment that judges."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from examples.sft_to_rl.tasks.documents import Batch, Vocabulary

Split = Literal["id", "ood"]
ProblemsT = TypeVar("ProblemsT", bound="Problems")


@dataclass(frozen=True)
class Recipe:
    """How long a task's base and its SFT ladder are trained.

    Args:
        pretraining_steps: Steps of the warm-up documents, then of the full mixture.
        decay_steps: The learning rate of pre-training falls linearly over this many last steps.
        demonstrations: Number of SFT demonstrations.
        moderate_epochs: SFT epochs of the ``modsft`` checkpoint.
        excessive_epochs: SFT epochs of the ``oversft`` checkpoint.
    """

    pretraining_steps: tuple[int, int]
    decay_steps: int
    demonstrations: int
    moderate_epochs: int
    excessive_epochs: int


@dataclass
class Problems:
    """A batch of problems; every field of a subclass is a tensor whose first dimension is the batch."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def repeat(self: ProblemsT, times: int) -> ProblemsT:
        """Each problem `times` times in a row: a GRPO group is `times` consecutive rows."""
        return replace(
            self, **{f.name: getattr(self, f.name).repeat_interleave(times, dim=0) for f in fields(self)}
        )


@dataclass
class Outcome:
    """What the verifier says about a batch of finished episodes, each a float32 tensor ``[B]``.

    Args:
        rewards: 1 if the task is solved *and* the closing form is complete, else 0.
        form_complete: 1 if the closing form is complete and in order.
        style_rate: How much of the careful style (the minority style of the base) was used, in [0, 1]
            for one careful action per opportunity.
        solved: 1 if the task is solved, whatever became of the form.
    """

    rewards: Tensor
    form_complete: Tensor
    style_rate: Tensor
    solved: Tensor


@dataclass
class Questions:
    """Facts that are asked for one by one: the next token is the answer.

    Args:
        prompts: ``[N, P]`` int64.
        answers: ``[N]`` int64.
    """

    prompts: Tensor
    answers: Tensor


class Environment(Protocol):
    """A batch of running episodes.

    Attributes:
        prompts: What the agent sees first, ``[B, P]`` int64, all of one length.
        max_new_tokens: Tokens after which an episode is cut, injected ones included.
        done: Which episodes are over, ``[B]`` bool.
    """

    prompts: Tensor
    max_new_tokens: int
    done: Tensor

    def step(self, proposed: Tensor) -> tuple[Tensor, Tensor]:
        """Advance every episode by one token.

        Args:
            proposed: The token that the policy would write next, ``[B]`` int64.

        Returns:
            The token that is really next (the environment's where it speaks, padding where the episode is
            over), ``[B]``, and whether it is the agent's own, ``[B]`` bool.
        """
        ...

    def outcome(self) -> Outcome:
        """Judge the episodes as they stand; an unfinished one earns nothing."""
        ...


class Task(Protocol):
    """A task of the demo. All randomness comes from the generators that are passed in.

    Attributes:
        name: By which it is asked for.
        title: The same in words.
        vocabulary: Its tokens.
        recipe: How long its base and its SFT ladder are trained.
        positions: How many tokens an episode may have, the prompt included: the context of its model.
    """

    name: str
    title: str
    vocabulary: Vocabulary
    recipe: Recipe
    positions: int

    def pretraining_documents(self, generator: torch.Generator, count: int, warm_up: bool) -> Batch:
        """Documents the base learns from; `warm_up` selects the easier ones of the first phase."""
        ...

    def demonstrations(self, generator: torch.Generator, count: int) -> Batch:
        """Narrow but successful SFT demonstrations, all with the closing form."""
        ...

    def problems(self, generator: torch.Generator, count: int, split: Split = "id") -> Problems:
        """Problems for RL and evaluation, in or out of the distribution of SFT and RL."""
        ...

    def environment(self, problems: Problems) -> Environment:
        """Start one episode per problem."""
        ...

    def questions(self) -> dict[str, Questions]:
        """What is to be known by heart, by kind; empty where nothing is."""
        ...
