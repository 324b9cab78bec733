"""What people do about an over-trained model today: variants of the example's GRPO."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.sft_to_rl.grpo import GRPO, response_distributions
from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.sampling import Rollouts
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import Task

ENTROPY_BONUS = 0.05
KL_COEFFICIENT = 0.1
HOT_TEMPERATURE = 1.5
LONGER = 4


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of every next-token distribution: log-probabilities ``[B, T, V]`` to nats ``[B, T]``."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def kl_estimate(log_probs: Tensor, base_log_probs: Tensor) -> Tensor:
    """GRPO's unbiased estimate of KL(policy ‖ base) from the sampled tokens, in nats, elementwise.

    r − ln r − 1 with r = p_base / p (Shao et al. 2024, arXiv 2402.03300, equation 4).
    """
    log_ratio = base_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


class Regularized(GRPO):
    """GRPO with a term on every agent token of the minibatch, groups without a learning signal included."""

    def penalty(self, sequences: Tensor, prompt_length: int) -> Tensor:
        """What is added to the loss, per token after the prompt: ``[B, T]``."""
        raise NotImplementedError

    def minibatch_loss(
        self, rollouts: Rollouts, advantages: Tensor, informative: Tensor, members: Tensor
    ) -> Tensor:
        """The policy's loss, where there is one, and the mean penalty over the minibatch's agent tokens."""
        policy = super().minibatch_loss(rollouts, advantages, informative, members)
        sequences = rollouts.sequences()[members].to(self.device)
        mask = rollouts.agent_mask[members].to(self.device)
        penalty = self.penalty(sequences, rollouts.prompts.shape[1])[mask].mean()
        return penalty if policy is None else policy + penalty


class EntropyBonus(Regularized):
    """GRPO that is rewarded for entropy."""

    def penalty(self, sequences: Tensor, prompt_length: int) -> Tensor:
        """−0.05 × entropy."""
        return -ENTROPY_BONUS * entropy(response_distributions(self.model, sequences, prompt_length))


class KLToBase(Regularized):
    """GRPO with the KL penalty of its paper, toward the base instead of the SFT model.

    Args:
        model: The policy to start from.
        task: Where problems and rewards come from.
        settings: Sizes.
        seed: Of problems, sampler and minibatches.
        base: The base's checkpoint.
    """

    def __init__(
        self, model: LlamaForCausalLM, task: Task, settings: Settings, seed: int, base: Path
    ) -> None:
        super().__init__(model, task, settings, seed)
        self.__dict__["base"] = load_model(base).eval()  # no submodule: neither trained nor saved

    def penalty(self, sequences: Tensor, prompt_length: int) -> Tensor:
        """0.1 × KL to the base."""
        base: LlamaForCausalLM = self.__dict__["base"].to(self.device)
        with torch.no_grad():
            base_distributions = response_distributions(base, sequences, prompt_length)
        distributions = response_distributions(self.model, sequences, prompt_length)
        targets = sequences[:, prompt_length:, None]
        sampled = [d.gather(2, targets)[..., 0] for d in (distributions, base_distributions)]
        return KL_COEFFICIENT * kl_estimate(*sampled)


class Hot(GRPO):
    """GRPO at temperature 1.5, in sampling and in the policy that is optimised; evaluation stays at 1."""

    temperature = HOT_TEMPERATURE


def make_rl(
    remedy: str | None, model: LlamaForCausalLM, task: Task, settings: Settings, seed: int, base: Path
) -> GRPO:
    """The RL of one arm, plain GRPO without a remedy.

    Raises:
        ValueError: If there is no such remedy.
    """
    if remedy == "kl_to_base":
        return KLToBase(model, task, settings, seed, base)
    if remedy == "long_rl":
        return GRPO(model, task, dataclasses.replace(settings, rl_steps=LONGER * settings.rl_steps), seed)
    kinds: dict[str | None, type[GRPO]] = {None: GRPO, "entropy_bonus": EntropyBonus, "hot": Hot}
    if remedy not in kinds:
        known = sorted({"kl_to_base", "long_rl", *filter(None, kinds)})
        raise ValueError(f"Expected `remedy` to be None or one of {known} but got {remedy!r}.")
    return kinds[remedy](model, task, settings, seed)
