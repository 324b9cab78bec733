"""Lean on-policy GRPO (Shao et al. 2024, arXiv 2402.03300): one update a step, without KL term."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from examples.sft_to_rl.grpo import group_advantages
from studies.real.logits import packed_logits
from studies.real.master import MasterWeights
from studies.real.model import end_of
from studies.real.recipes import RL
from studies.real.sampling import sample
from studies.real.tasks import Problem, has_format, reward
from studies.real.texts import encode_prompt


def policy_loss(logits: Tensor, tokens: Tensor, advantages: Tensor, rl: RL) -> Tensor:
    """Return −Σ A·log π(token), less the entropy bonus, over the tokens of some responses: a sum, not a mean.

    On-policy the ratio of new to old probability is one where the gradient is taken: clipping never acts, and this
    has the gradient of GRPO's surrogate.

    Args:
        logits: At the positions that predict the tokens, ``[N, V]``.
        tokens: ``[N]``.
        advantages: Of the response that each token belongs to, ``[N]``.
        rl: Temperature and entropy bonus.
    """
    log_probs = (logits / rl.temperature).log_softmax(dim=-1)
    loss = -(advantages * log_probs.gather(1, tokens[:, None])[:, 0]).sum()
    if rl.entropy_bonus:
        loss = loss + rl.entropy_bonus * (log_probs.exp() * log_probs).sum()
    return loss


class ProblemStream(IterableDataset[list[Problem]]):
    """The problems of one step after those of the other: the same for every arm.

    Args:
        problems: All of them.
        size: How many a step.
    """

    def __init__(self, problems: Sequence[Problem], size: int) -> None:
        self.problems, self.size = problems, size

    def __len__(self) -> int:
        return len(self.problems) // self.size

    def __iter__(self) -> Iterator[list[Problem]]:
        for first in range(0, len(self) * self.size, self.size):
            yield list(self.problems[first : first + self.size])


class GRPO(MasterWeights):
    """Sample a group of responses for each problem, normalise rewards within the group, take one step.

    The loss is a mean over all tokens that were sampled in the step. A group whose rewards are all equal has no
    advantage: it is not run again, unless there is an entropy bonus. Train it for one epoch.

    Args:
        model: The policy to start from.
        tokenizer: Of the model.
        problems: ``rl.steps * rl.prompts`` of them.
        rl: The budget.
        dtype: What is computed in.
        seed: Of the samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        problems: Sequence[Problem],
        rl: RL,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        super().__init__(model, rl.learning_rate, dtype)
        self.tokenizer, self.problems, self.rl = tokenizer, problems, rl
        self.sampler = torch.Generator().manual_seed(seed)

    def train_dataloader(self) -> DataLoader[list[Problem]]:
        """The problems, one batch a step."""
        return DataLoader(ProblemStream(self.problems, self.rl.prompts), batch_size=None)

    def training_step(self, problems: list[Problem], batch_idx: int) -> None:
        """Sample once, then take one step, if any group teaches something."""
        rl, group = self.rl, self.rl.group
        prompts = [encode_prompt(self.tokenizer, problem.question) for problem in problems]
        samples = sample(
            self.model,
            prompts,
            group,
            rl.max_new_tokens,
            end=end_of(self.tokenizer),
            generator=self.sampler,
            temperature=rl.temperature,
        )
        texts = [self.tokenizer.decode(tokens) for tokens in samples.tokens]
        rewards = torch.tensor([reward(problems[row // group], text) for row, text in enumerate(texts)]).view(
            -1, group
        )
        informative = rewards.amax(dim=1) > rewards.amin(dim=1)
        groups = [samples.tokens[first : first + group] for first in range(0, len(texts), group)]
        norm = self.learn(prompts, groups, group_advantages(rewards), informative)
        self.log_dict(
            {
                "reward": rewards.mean(),
                "pass_at_k": rewards.amax(dim=1).mean(),
                "zero_variance": 1 - informative.float().mean(),
                "format": sum(map(has_format, texts)) / len(texts),
                "entropy": samples.token_entropy,
                "length": samples.token_count / len(texts),
                "grad_norm": norm,
            },
            batch_size=len(problems),
        )

    def learn(
        self,
        prompts: Sequence[list[int]],
        groups: Sequence[list[list[int]]],
        advantages: Tensor,
        informative: Tensor,
    ) -> float:
        """Take one step on sampled groups; return the norm of the gradient before clipping, 0 without one.

        Args:
            prompts: Token ids.
            groups: Token ids of the responses to each.
            advantages: One for each response, ``[prompts, group]``.
            informative: Which groups have an advantage, ``[prompts]`` bool.
        """
        sampled = sum(len(response) for responses in groups for response in responses)
        learned = False
        for prompt, responses, of_group, informs in zip(
            prompts, groups, advantages, informative.tolist(), strict=True
        ):
            if not (informs or self.rl.entropy_bonus):
                continue
            logits, tokens = packed_logits(self.model, prompt, responses)
            lengths = torch.tensor([len(response) for response in responses])
            of_token = of_group.repeat_interleave(lengths).to(logits)
            self.manual_backward(policy_loss(logits, tokens, of_token, self.rl) / sampled)
            learned = True
        return self.update() if learned else 0.0
