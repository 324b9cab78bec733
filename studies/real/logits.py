"""Teacher-forced logits at the positions that predict a response, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from studies.real.texts import Pair


def response_logits(model: PreTrainedModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Run prompts with their responses, one a row.

    Args:
        model: A decoder of transformers whose body is ``model.model`` and whose head is ``model.lm_head``.
        pairs: Prompts and responses.

    Returns:
        Logits ``[N, V]`` for every token of every response, response after response, in float32 or wider; and
        the tokens, ``[N]``.
    """
    rows = [pair.prompt + pair.response for pair in pairs]
    width = max(map(len, rows))
    # What stands right of a row is never attended to by it: no mask is needed.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        predicts[row, len(pair.prompt) - 1 : len(pair.prompt) + len(pair.response) - 1] = True
    hidden = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[predicts.to(model.device)])
    return _wide(logits), ids.roll(-1, 1)[predicts].to(model.device)


def packed_logits(
    model: PreTrainedModel, prompt: list[int], responses: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """Run all responses to one prompt in one row, behind one copy of it.

    Each response attends to the prompt and to itself, and its positions go on where the prompt ends.

    Args:
        model: As for `response_logits`.
        prompt: Token ids.
        responses: Token ids of each response.

    Returns:
        As `response_logits`: what it gives for the same prompt with each of the responses.
    """
    length, lengths = len(prompt), [len(response) for response in responses]
    ids = torch.tensor([prompt + [token for response in responses for token in response]])
    positions = [*range(length), *(length + k for n in lengths for k in range(n))]
    owner = torch.tensor([-1] * length + [i for i, n in enumerate(lengths) for _ in range(n)])
    visible = ((owner == -1)[None, :] | (owner[None, :] == owner[:, None])).tril()
    mask = torch.zeros(visible.shape, dtype=model.dtype)
    mask = mask.masked_fill(~visible, torch.finfo(model.dtype).min)[None, None]
    hidden = model.model(
        input_ids=ids.to(model.device),
        position_ids=torch.tensor([positions]).to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=False,
    ).last_hidden_state[0]
    predicts, at = [], length
    for n in lengths:
        predicts += [length - 1, *range(at, at + n - 1)]
        at += n
    return _wide(model.lm_head(hidden[predicts])), ids[0, length:].to(model.device)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
