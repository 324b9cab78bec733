"""A lean batched sampler: every prompt is run once, its cache is repeated, rows that have ended leave."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

ROWS = 256  # responses that are sampled together
LEAVE_BELOW = 0.75  # rows that have ended leave if fewer than this share of the batch goes on
ALWAYS_LEAVE = 8  # and always if no more rows than this are in it


@dataclass(frozen=True)
class Samples:
    """Sampled responses, group after group in the order of their prompts.

    Args:
        tokens: Token ids of each response; the last is the end of the turn unless the response was cut.
        log_probs: Of each token under the distribution that it was drawn from, nats.
        entropies: Of the distribution that each token was drawn from, nats.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    entropies: list[list[float]]

    @property
    def token_entropy(self) -> float:
        """Mean entropy over all tokens, nats."""
        return sum(map(sum, self.entropies)) / self.token_count

    @property
    def token_count(self) -> int:
        """Tokens of all responses."""
        return sum(map(len, self.tokens))


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one index from each row of ``[B, V]``, by the inverse of its cumulative sum.

    `torch.multinomial` draws one exponential variable for every entry: a third of the time of decoding with a
    vocabulary of 49,152.

    >>> draw(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])).tolist()
    [1, 0]
    """
    cumulative = probabilities.cumsum(dim=-1)
    uniform = torch.rand(len(probabilities), 1, generator=generator).to(probabilities.device)
    # `right`: the first index whose sum is above the draw has a probability above zero.
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return found[:, 0].clamp(max=probabilities.shape[1] - 1)


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the argument that takes a cache: transformers 5.24 gave it a new one."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    group: int,
    max_new_tokens: int,
    *,
    end: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    rows: int = ROWS,
) -> Samples:
    """Sample `group` responses to every prompt.

    Args:
        model: A decoder of transformers whose body is ``model.model`` and whose head is ``model.lm_head``.
        prompts: Token ids.
        group: Responses a prompt.
        max_new_tokens: Where a response is cut.
        end: The token that ends a response.
        generator: Of the draws, on the CPU.
        temperature: What logits are divided by; log-probabilities and entropies are of that distribution.
        greedy: Take the most likely token instead of a draw.
        rows: Responses that are sampled together, at most; at least one group is.
    """
    count = len(prompts) * group
    samples = Samples([[] for _ in range(count)], [[] for _ in range(count)], [[] for _ in range(count)])
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    together = max(1, rows // group)
    training = model.training
    model.eval()
    for first in range(0, len(order), together):
        chosen = order[first : first + together]
        live = [index * group + k for index in chosen for k in range(group)]
        decoding = _Decoding(model, [prompts[index] for index in chosen], live, end)
        for step in range(max_new_tokens):
            log_probs = (decoding.logits / temperature).log_softmax(dim=-1)
            probabilities = log_probs.exp()
            tokens = probabilities.argmax(dim=-1) if greedy else draw(probabilities, generator)
            decoding.keep(samples, tokens, log_probs, -(probabilities * log_probs).sum(dim=-1))
            if bool(decoding.ended.all()) or step == max_new_tokens - 1:
                break
            decoding.advance(tokens)
    model.train(training)
    return samples


class _Decoding:
    """Some responses that are decoded together.

    Args:
        model: The model.
        prompts: Token ids.
        live: Which responses, as many to each prompt.
        end: The token that ends a response.

    Attributes:
        logits: Of the next token of every row, ``[B, V]``.
        ended: Which rows have ended and are still there, ``[B]`` bool on the CPU.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], live: Sequence[int], end: int
    ) -> None:
        self.model, self.end = model, end
        self.live = torch.tensor(live)
        group = len(live) // len(prompts)
        self.cache = DynamicCache(config=model.config)
        self.name = cache_argument(model.model)
        width = max(map(len, prompts))
        ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        mask = mask.to(model.device)
        logits = self._forward(ids.to(model.device), mask, (mask.cumsum(dim=1) - 1).clamp(min=0))
        self.cache.batch_repeat_interleave(group)
        self.mask = mask.repeat_interleave(group, dim=0)
        self.logits = logits.repeat_interleave(group, dim=0)
        self.position = self.mask.sum(dim=1)
        self.ended = torch.zeros(len(self.mask), dtype=torch.bool)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        by_name = {self.name: self.cache}
        body = self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **by_name
        )
        logits: Tensor = self.model.lm_head(body.last_hidden_state[:, -1]).float()
        return logits

    def keep(self, samples: Samples, tokens: Tensor, log_probs: Tensor, entropies: Tensor) -> None:
        """Append one token to every response that has not ended."""
        picked = log_probs.gather(1, tokens[:, None])[:, 0]
        ended = self.ended.tolist()
        rows = zip(self.live.tolist(), tokens.tolist(), picked.tolist(), entropies.tolist(), strict=True)
        for row, (index, token, log_prob, entropy) in enumerate(rows):
            if ended[row]:
                continue
            samples.tokens[index].append(token)
            samples.log_probs[index].append(log_prob)
            samples.entropies[index].append(entropy)
        self.ended |= (tokens == self.end).cpu()

    def advance(self, tokens: Tensor) -> None:
        """Run the model on the last token of every row, after rows that have ended left."""
        going = ~self.ended
        if bool(self.ended.any()) and (going.float().mean() < LEAVE_BELOW or len(going) <= ALWAYS_LEAVE):
            rows = going.nonzero()[:, 0]
            on_device = rows.to(self.mask.device)
            self.cache.batch_select_indices(on_device)
            self.mask, self.position = self.mask[on_device], self.position[on_device]
            tokens = tokens[on_device]
            self.live, self.ended = self.live[rows], self.ended[rows]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.logits = self._forward(tokens[:, None], self.mask, self.position[:, None])
        self.position = self.position + 1
