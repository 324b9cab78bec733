"""How well a model answers: pass@1 and pass@k, and what its samples look like."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from studies.real.model import end_of
from studies.real.sampling import sample
from studies.real.seeds import seed_of
from studies.real.tasks import SPLITS, has_format, is_worked, reward
from studies.real.texts import encode_prompt

Scores = dict[str, float]


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    split: str,
    size: tuple[int, int],
    max_new_tokens: int,
    seed: int,
) -> Scores:
    """Sample responses at temperature 1 and look at them.

    Args:
        model: What is evaluated.
        tokenizer: Its tokenizer.
        split: Whose problems.
        size: Problems, and responses to each.
        max_new_tokens: Where a response is cut.
        seed: Of problems and samples.

    Returns:
        ``pass_at_1``; ``pass_at_k``, the share of problems with a right response among all of theirs;
        ``zero_variance``, the share of groups whose rewards are all equal; ``format`` and ``worked``, shares of the
        responses; ``entropy`` of a token, nats; ``length``, tokens a response.
    """
    count, group = size
    problems = SPLITS[split].draw(count, seed_of(f"problems {split}", seed))
    samples = sample(
        model,
        [encode_prompt(tokenizer, problem.question) for problem in problems],
        group,
        max_new_tokens,
        end=end_of(tokenizer),
        generator=torch.Generator().manual_seed(seed_of(f"samples {split}", seed)),
    )
    texts = [tokenizer.decode(tokens) for tokens in samples.tokens]
    rewards = torch.tensor([reward(problems[row // group], text) for row, text in enumerate(texts)])
    rewards = rewards.view(count, group)
    scores = {
        "pass_at_1": float(rewards.mean()),
        "pass_at_k": float(rewards.amax(dim=1).mean()),
        "zero_variance": float((rewards.amax(dim=1) == rewards.amin(dim=1)).float().mean()),
        "format": sum(map(has_format, texts)) / len(texts),
        "worked": sum(map(is_worked, texts)) / len(texts),
        "entropy": samples.token_entropy,
        "length": samples.token_count / len(texts),
    }
    return {name: round(value, 5) for name, value in scores.items()}
