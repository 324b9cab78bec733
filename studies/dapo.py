"""GRPO with DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, §3.2), within the budget of plain GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from examples.sft_to_rl.grpo import GRPO, ProblemStream
from examples.sft_to_rl.sampling import Rollouts
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import Problems, Task

T = TypeVar("T", Rollouts, Problems)


class DAPO(GRPO):
    """GRPO whose steps are made from groups with differing rewards alone; others are replaced by new prompts.

    A step samples `settings.prompts` prompts, then as many new ones as it lacks groups with differing rewards, and so
    on, until it has `settings.prompts` of these or the whole run has sampled `settings.rl_budget` responses, what
    plain GRPO samples. (DAPO samples whole batches and drops the groups that are too many; here none is.) Where the
    budget ends within a step, the step is made from the groups that it has by then; if it has none, there is no
    update. Then RL is over: it has made fewer gradient steps than plain GRPO unless every group had a signal. Prompts
    come from the stream of the other arms, in its order, and none is left out, so that budgets end together with it.
    What is logged (reward, zero-variance groups …) is of all responses that the step sampled. Of DAPO's other changes
    the token-level loss is GRPO's here already; clip-higher and overlong shaping are left out.

    Args:
        model: The policy to start from.
        task: Where problems and rewards come from.
        settings: Sizes.
        seed: Of problems, sampler and minibatches.
    """

    def __init__(self, model: LlamaForCausalLM, task: Task, settings: Settings, seed: int) -> None:
        super().__init__(model, task, settings, seed)
        self.problems = _one_by_one(ProblemStream(task, settings, seed))

    def train_dataloader(self) -> DataLoader:
        """One number for each step that there is at most; the problems come from `problems`."""
        return DataLoader(range(self.settings.rl_steps), batch_size=None)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """End RL, which is one epoch, when the budget is used up."""
        return -1 if self.responses >= self.settings.rl_budget else None

    def collect(self, problems: Any) -> Rollouts:
        """All responses of one step, groups without a signal included; its argument says nothing."""
        wanted, group = self.settings.prompts, self.settings.group
        collected: list[Rollouts] = []
        informative = 0
        while informative < wanted and self.responses < self.settings.rl_budget:
            left = (self.settings.rl_budget - self.responses) // group
            drawn = [next(self.problems) for _ in range(min(wanted - informative, left))]
            collected.append(super().collect(_together(drawn)))
            informative += int(_differing(collected[-1].rewards.view(-1, group)).sum())
        return concatenate_rollouts(collected)

    def update(self, rollouts: Rollouts, rewards: Tensor) -> tuple[list[float], list[float]]:
        """Take GRPO's steps on the groups with differing rewards, as if no other had been sampled."""
        kept = _differing(rewards)
        if not bool(kept.any()):
            return [], []
        rows = kept.repeat_interleave(rewards.shape[1])
        return super().update(_rows(rollouts, rows), rewards[kept])


def concatenate_rollouts(parts: list[Rollouts]) -> Rollouts:
    """Episodes one after the other, padded after their ends to the longest; their prompts are of one length."""
    width = max(part.tokens.shape[1] for part in parts)
    columns = {}
    for field in fields(Rollouts):
        tensors = [getattr(part, field.name) for part in parts]
        if field.name in ("tokens", "agent_mask", "log_probs", "entropies"):
            tensors = [F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]  # 0 is padding
        columns[field.name] = torch.cat(tensors)
    return Rollouts(**columns)


def _differing(rewards: Tensor) -> Tensor:
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def _one_by_one(stream: ProblemStream) -> Iterator[Problems]:
    for problems in stream:
        for row in range(len(problems)):
            yield _rows(problems, slice(row, row + 1))


def _together(problems: list[Problems]) -> Problems:
    first = problems[0]
    columns = {f.name: torch.cat([getattr(p, f.name) for p in problems]) for f in fields(first)}
    return replace(first, **columns)


def _rows(table: T, rows: Any) -> T:
    """The chosen rows of a dataclass of tensors."""
    return replace(table, **{f.name: getattr(table, f.name)[rows] for f in fields(table)})
