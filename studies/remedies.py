"""What people do about an over-trained model today: variants of the example's GRPO."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.sft_to_rl.grpo import GRPO, LR, response_distributions
from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.sampling import Rollouts
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import Task
from studies.dapo import DAPO

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}

# What is varied, and its value: a weight in the loss, a temperature, or a factor on what plain GRPO has.
REMEDIES = {
    "entropy_bonus_01": ("entropy bonus", 0.01),
    "entropy_bonus": ("entropy bonus", 0.05),
    "entropy_bonus_20": ("entropy bonus", 0.2),
    "kl_to_base_02": ("KL to the base", 0.02),
    "kl_to_base": ("KL to the base", 0.1),
    "kl_to_base_50": ("KL to the base", 0.5),
    "kl_to_sft_02": ("KL to the start", 0.02),
    "kl_to_sft_10": ("KL to the start", 0.1),
    "kl_to_sft_50": ("KL to the start", 0.5),
    "hot": ("temperature", 1.5),  # in sampling and in the policy that is optimised; evaluation stays at 1
    "hot_2": ("temperature", 2.0),
    "lr_3": ("learning rate", 3.0),
    "lora": ("adapters", 10.0),  # the learning rate of the adapters, as a multiple of that of all weights
    "long_rl": ("steps", 4.0),
    "group_32": ("group", 4.0),  # fewer prompts, as many responses
    "dapo": ("dynamic sampling", 1.0),
}


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
    """GRPO that is rewarded for entropy.

    Args:
        model: The policy to start from.
        task: Where problems and rewards come from.
        settings: Sizes.
        seed: Of problems, sampler and minibatches.
        weight: Of the entropy, in nats per token.
    """

    def __init__(
        self, model: LlamaForCausalLM, task: Task, settings: Settings, seed: int, weight: float
    ) -> None:
        super().__init__(model, task, settings, seed)
        self.weight = weight

    def penalty(self, sequences: Tensor, prompt_length: int) -> Tensor:
        """−weight × entropy."""
        return -self.weight * entropy(response_distributions(self.model, sequences, prompt_length))


class KLPenalty(Regularized):
    """GRPO with the KL penalty of its paper, toward a model that is given: there it is the SFT model.

    Args:
        model: The policy to start from.
        task: Where problems and rewards come from.
        settings: Sizes.
        seed: Of problems, sampler and minibatches.
        reference: What the policy is held to.
        weight: Of the divergence, in nats per token.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        task: Task,
        settings: Settings,
        seed: int,
        reference: LlamaForCausalLM,
        weight: float,
    ) -> None:
        super().__init__(model, task, settings, seed)
        self.__dict__["reference"] = reference.eval()  # no submodule: neither trained nor saved
        self.weight = weight

    def penalty(self, sequences: Tensor, prompt_length: int) -> Tensor:
        """Weight × KL to the reference."""
        reference: LlamaForCausalLM = self.__dict__["reference"].to(self.device)
        with torch.no_grad():
            reference_distributions = response_distributions(reference, sequences, prompt_length)
        distributions = response_distributions(self.model, sequences, prompt_length)
        targets = sequences[:, prompt_length:, None]
        sampled = [d.gather(2, targets)[..., 0] for d in (distributions, reference_distributions)]
        return self.weight * kl_estimate(*sampled)


def add_adapters(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Put LoRA adapters (Hu et al. 2021, arXiv 2106.09685) into a model, in place, and freeze everything else.

    Rank 8, alpha 16, in every linear layer but the head, as PEFT's ``"all-linear"`` has it. The policy is the same
    as before: one of an adapter's two matrices begins at zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "LoRA").initial_seed())
        return inject_adapter_in_model(LoraConfig(**LORA), model)


def make_rl(
    remedy: str | None, model: LlamaForCausalLM, task: Task, settings: Settings, seed: int, base: Path
) -> GRPO:
    """The RL of one arm, plain GRPO without a remedy.

    Args:
        remedy: None, or one of `REMEDIES`.
        model: The policy to start from; ``"lora"`` adds adapters to it.
        task: Where problems and rewards come from.
        settings: Sizes of plain GRPO.
        seed: Of problems, sampler and minibatches.
        base: The base's checkpoint.

    Raises:
        ValueError: If there is no such remedy.
    """
    if remedy not in (None, *REMEDIES):
        raise ValueError(f"Expected `remedy` to be None or one of {sorted(REMEDIES)} but got {remedy!r}.")
    kind, value = REMEDIES[remedy] if remedy else ("plain", 1.0)
    if kind == "entropy bonus":
        return EntropyBonus(model, task, settings, seed, value)
    if kind == "KL to the base":
        return KLPenalty(model, task, settings, seed, load_model(base), value)
    if kind == "KL to the start":
        return KLPenalty(model, task, settings, seed, copy.deepcopy(model), value)
    if kind == "dynamic sampling":
        return DAPO(model, task, settings, seed)
    if kind == "adapters":
        model = add_adapters(model, seed)
    elif kind == "steps":
        settings = replace(settings, rl_steps=round(value * settings.rl_steps))
    elif kind == "group":
        factor = round(value)
        settings = replace(settings, prompts=settings.prompts // factor, group=settings.group * factor)
    module = GRPO(model, task, settings, seed)
    if kind == "temperature":
        module.temperature = value
    elif kind in ("learning rate", "adapters"):
        module.learning_rate = value * LR
    return module
