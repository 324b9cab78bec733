"""Evaluation of a checkpoint on one split: verified rewards of sampled and greedy responses."""

from __future__ import annotations

from typing import TypedDict

from transformers import PreTrainedModel

from examples.sft_to_rl.sampling import sample
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks import Task
from examples.sft_to_rl.tasks.base import Split


class Scores(TypedDict):
    """Scores of one checkpoint on one split, each a mean over prompts in [0, 1] except the entropy (nats)."""

    pass_at_1: float
    pass_at_k: float
    greedy: float
    form_rate: float
    style_rate: float
    token_entropy: float


def evaluate(
    model: PreTrainedModel, task: Task, split: Split, prompts: int, samples: int, seed: int
) -> Scores:
    """Score `model` on `prompts` problems with `samples` samples each (k of pass@k) at temperature 1.

    The problems and the sampler's seed depend on `seed` and `split` only: every arm meets the same test.
    """
    problems = task.problems(generator(seed, f"evaluation problems {split}"), prompts, split)
    greedy = sample(model, task.environment(problems), greedy=True)
    sampler = generator(seed, f"evaluation samples {split}")
    rollouts = sample(model, task.environment(problems.repeat(samples)), sampler)
    rewards = rollouts.rewards.view(prompts, samples)
    return Scores(
        pass_at_1=float(rewards.mean()),
        pass_at_k=float(rewards.amax(dim=1).mean()),
        greedy=float(greedy.rewards.mean()),
        form_rate=float(rollouts.form_complete.mean()),
        style_rate=float(rollouts.style_rate.mean()),
        token_entropy=rollouts.token_entropy,
    )
