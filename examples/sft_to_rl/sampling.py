"""Sampling with a KV cache from a model that shares its context with an environment."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from examples.sft_to_rl.tasks.base import Environment
from examples.sft_to_rl.tasks.documents import IGNORE, Batch


@dataclass
class Rollouts:
    """A batch of finished episodes; `T` counts the tokens after the prompt, the environment's included.

    Args:
        prompts: ``[B, P]`` int64.
        tokens: ``[B, T]`` int64, padded after the end of an episode.
        agent_mask: ``[B, T]`` bool, true on the tokens that the model itself sampled.
        log_probs: Log-probability of each token under the sampling distribution, in nats; 0 off the mask.
        entropies: Entropy of the distribution that each token was sampled from, in nats; 0 off the mask.
        rewards: ``[B]`` float32.
        form_complete: ``[B]`` float32.
        style_rate: ``[B]`` float32.
        solved: ``[B]`` float32.
    """

    prompts: Tensor
    tokens: Tensor
    agent_mask: Tensor
    log_probs: Tensor
    entropies: Tensor
    rewards: Tensor
    form_complete: Tensor
    style_rate: Tensor
    solved: Tensor

    @property
    def token_entropy(self) -> float:
        """Mean entropy over the agent's own tokens, in nats."""
        return float(self.entropies.sum() / self.agent_mask.sum())

    def sequences(self) -> Tensor:
        """Prompts and tokens together, ``[B, P + T]``."""
        return torch.cat([self.prompts, self.tokens], dim=1)

    def batch(self) -> Batch:
        """The episodes as a batch with labels on the agent's own tokens."""
        labels = self.tokens.masked_fill(~self.agent_mask, IGNORE)
        prompt_labels = torch.full_like(self.prompts, IGNORE)
        return {"input_ids": self.sequences(), "labels": torch.cat([prompt_labels, labels], dim=1)}


def _cache_argument(model: PreTrainedModel) -> str:
    """Its name: transformers 5.24 gave it a new one."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    environment: Environment,
    generator: torch.Generator | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
) -> Rollouts:
    """Play every episode of `environment` to its end.

    The model proposes a token for every episode; the environment decides which of them count, and puts its
    own token where it is its turn to speak. All prompts have one length, so no position is ever padded on the
    left and the cache needs no attention mask. Only the model's forward runs on the model's device: episodes,
    draws and what is returned stay on the CPU.

    Args:
        model: A causal language model.
        environment: A batch of fresh episodes.
        generator: Source of the samples.
        greedy: Take the most likely token instead of sampling.
        temperature: What the logits are divided by; log-probabilities and entropies are of that distribution.
    """
    cache = DynamicCache(config=model.config)
    by_name = {_cache_argument(model): cache}
    inputs = environment.prompts
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for _ in range(environment.max_new_tokens):
        output = model(input_ids=inputs.to(model.device), use_cache=True, logits_to_keep=1, **by_name)
        log_probs = (output.logits[:, -1] / temperature).log_softmax(dim=-1).cpu()
        probs = log_probs.exp()
        proposed = probs.argmax(-1) if greedy else torch.multinomial(probs, 1, generator=generator)[:, 0]
        tokens, is_agent = environment.step(proposed)
        token_log_probs = log_probs.gather(1, tokens[:, None])[:, 0]
        steps.append((tokens, is_agent, token_log_probs, -(probs * log_probs).sum(dim=-1)))
        if bool(environment.done.all()):
            break
        inputs = tokens[:, None]
    tokens, agent_mask, log_probs, entropies = (
        torch.stack(column, dim=1) for column in zip(*steps, strict=True)
    )
    outcome = environment.outcome()
    return Rollouts(
        prompts=environment.prompts,
        tokens=tokens,
        agent_mask=agent_mask,
        log_probs=log_probs.masked_fill(~agent_mask, 0.0),
        entropies=entropies.masked_fill(~agent_mask, 0.0),
        rewards=outcome.rewards,
        form_complete=outcome.form_complete,
        style_rate=outcome.style_rate,
        solved=outcome.solved,
    )
