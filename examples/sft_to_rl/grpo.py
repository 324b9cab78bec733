"""GRPO (Shao et al. 2024, arXiv 2402.03300) as a LightningModule, without the KL term."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM

from examples.sft_to_rl.sampling import Rollouts, sample
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.sft import held_out_demonstrations
from examples.sft_to_rl.tasks import Problems, Task
from examples.sft_to_rl.tasks.documents import Batch

LR = 5e-4
CLIP = 0.2
MINIBATCHES = 2
MAX_GRAD_NORM = 1.0


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards ``[prompts, group]``, each group normalised: (r − mean) / (std + 1e-4), population std."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-4)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    denominator: float,
) -> Tensor:
    """Clipped surrogate objective, negated: −Σ min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) / denominator.

    Args:
        log_probs: Of the sampled tokens under the current policy, ``[B, T]`` in nats.
        old_log_probs: Of the same tokens under the policy that sampled them, ``[B, T]``, without gradient.
        advantages: One per response, ``[B]``.
        mask: Where the agent wrote, ``[B, T]`` bool; other tokens add nothing to loss or gradient.
        clip: ε.
        denominator: What the sum over tokens is divided by.
    """
    ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0).exp()
    advantages = advantages[:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -surrogate.masked_fill(~mask, 0.0).sum() / denominator


def response_distributions(
    model: LlamaForCausalLM, sequences: Tensor, prompt_length: int, temperature: float = 1.0
) -> Tensor:
    """Teacher-forced log-probabilities of every next token after the prompt, ``[B, T, V]``."""
    logits = model(input_ids=sequences[:, :-1], use_cache=False).logits[:, prompt_length - 1 :]
    return (logits / temperature).log_softmax(dim=-1)


def response_log_probs(
    model: LlamaForCausalLM, sequences: Tensor, prompt_length: int, temperature: float = 1.0
) -> Tensor:
    """Teacher-forced log-probabilities of all tokens after the prompt, ``[B, T]``."""
    log_probs = response_distributions(model, sequences, prompt_length, temperature)
    return log_probs.gather(2, sequences[:, prompt_length:, None])[..., 0]


class ProblemStream(IterableDataset):
    """One batch of problems per RL step: a function of the seed alone, hence the same for every arm."""

    def __init__(self, task: Task, settings: Settings, seed: int) -> None:
        self.task, self.settings, self.seed = task, settings, seed

    def __len__(self) -> int:
        return self.settings.rl_steps

    def __iter__(self) -> Iterator[Problems]:
        draws = generator(self.seed, "RL problems")
        for _ in range(len(self)):
            yield self.task.problems(draws, self.settings.prompts)


class GRPO(L.LightningModule):
    """Sample a group of responses per prompt, normalise rewards within the group, take clipped policy steps.

    Manual optimisation: one `training_step` samples once and then updates on `MINIBATCHES` minibatches.
    Groups whose rewards are all equal have no advantage and are left out of the forward pass; the loss is
    still divided by all agent tokens of the minibatch. Train it for one epoch.

    Args:
        model: The policy to start from.
        task: Where problems and rewards come from.
        settings: Sizes.
        seed: Of problems, sampler and minibatches.

    Attributes:
        temperature: What logits are divided by, in sampling and in the policy that is optimised.
        learning_rate: AdamW's.
        responses: How many responses have been sampled so far.
    """

    temperature = 1.0
    learning_rate = LR

    def __init__(self, model: LlamaForCausalLM, task: Task, settings: Settings, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.task, self.settings, self.seed = task, settings, seed
        self.sampler = generator(seed, "RL samples")
        self.shuffler = generator(seed, "RL minibatches")
        self.responses = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a constant learning rate, 5e-4, without weight decay."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)

    def train_dataloader(self) -> DataLoader:
        """The problems, one batch per step."""
        return DataLoader(ProblemStream(self.task, self.settings, self.seed), batch_size=None)

    def transfer_batch_to_device(
        self, batch: Problems, device: torch.device, dataloader_idx: int
    ) -> Problems:
        """Leave the problems on the CPU, where the environments run."""
        return batch

    def calibration_dataloader(self) -> DataLoader:
        """Held-out demonstrations on which `RejuvenationCallback` checks alpha and chooses neurons."""
        batches = held_out_demonstrations(self.task, self.settings.held_out, self.seed)
        return DataLoader(batches, batch_size=None)

    def sample_responses(self, model: LlamaForCausalLM) -> list[Batch]:
        """Responses that a model samples to held-out prompts.

        `RejuvenationCallback` calls it with the model while that holds the base's weights, to find alpha.
        """
        problems = self.task.problems(generator(self.seed, "held-out problems"), self.settings.responses)
        sampler = generator(self.seed, "held-out samples")
        return [sample(model, self.task.environment(problems), sampler).batch()]

    def training_step(self, problems: Problems, batch_idx: int) -> dict[str, Any]:
        """One RL step. `PlasticityCallback` reads the rewards ``[prompts, group]`` and the entropy returned."""
        rollouts = self.collect(problems)
        rewards = rollouts.rewards.view(-1, self.settings.group)
        before = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()
        losses, grad_norms = self.update(rollouts, rewards)
        after = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()

        zero_variance = rewards.amax(dim=1) == rewards.amin(dim=1)
        self.log("rl/reward", rewards.mean(), prog_bar=True)  # equals pass@1
        self.log_dict(
            {
                "rl/pass_at_k": rewards.amax(dim=1).mean(),
                "rl/zero_variance_groups": zero_variance.float().mean(),
                "rl/form_rate": rollouts.form_complete.mean(),
                "rl/entropy": rollouts.token_entropy,
                "rl/grad_norm": sum(grad_norms) / MINIBATCHES,
                "rl/update_norm": (after - before).norm(),
            }
        )
        return {"loss": torch.tensor(sum(losses)), "rewards": rewards, "entropy": rollouts.token_entropy}

    def collect(self, problems: Problems) -> Rollouts:
        """Sample a group of responses to each problem, `settings.group` consecutive rows."""
        environment = self.task.environment(problems.repeat(self.settings.group))
        rollouts = sample(self.model, environment, self.sampler, temperature=self.temperature)
        self.responses += len(rollouts.rewards)
        return rollouts

    def update(self, rollouts: Rollouts, rewards: Tensor) -> tuple[list[float], list[float]]:
        """Take one clipped step per minibatch; return the losses and the gradient norms before clipping."""
        optimizer: Any = self.optimizers()
        prompts, group = rewards.shape
        advantages = group_advantages(rewards).flatten()
        informative = (rewards.amax(dim=1) > rewards.amin(dim=1)).repeat_interleave(group)
        members = torch.arange(prompts * group).view(prompts, group)
        losses, grad_norms = [], []
        for chosen in torch.randperm(prompts, generator=self.shuffler).tensor_split(MINIBATCHES):
            loss = self.minibatch_loss(rollouts, advantages, informative, members[chosen].flatten())
            if loss is None:
                continue
            optimizer.zero_grad()
            self.manual_backward(loss)
            grad_norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)))
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, grad_norms

    def minibatch_loss(
        self, rollouts: Rollouts, advantages: Tensor, informative: Tensor, members: Tensor
    ) -> Tensor | None:
        """The loss of one minibatch, or None where nothing can be learned from it.

        Args:
            rollouts: All responses of the step.
            advantages: One per response, ``[B]``.
            informative: Which responses belong to a group with differing rewards, ``[B]`` bool.
            members: The responses of this minibatch, int64.
        """
        rows = members[informative[members]]
        if len(rows) == 0:
            return None
        sequences = rollouts.sequences()[rows].to(self.device)
        return grpo_loss(
            response_log_probs(self.model, sequences, rollouts.prompts.shape[1], self.temperature),
            rollouts.log_probs[rows].to(self.device),
            advantages[rows].to(self.device),
            rollouts.agent_mask[rows].to(self.device),
            clip=CLIP,
            denominator=float(rollouts.agent_mask[members].sum()),
        )
