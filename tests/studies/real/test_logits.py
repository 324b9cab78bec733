"""Packed and padded rows against sequences that are run one by one, in float64."""

from __future__ import annotations

import torch

from studies.real.logits import packed_logits, response_logits
from studies.real.texts import Pair
from tests.conftest import float64_llama

PROMPT = [3, 4, 5, 6]
RESPONSES = [[7, 8, 9], [10], [7, 8, 11, 12, 13], [7, 8, 9]]


def _one_by_one(model, pairs):
    rows = []
    for prompt, response in pairs:
        logits = model(torch.tensor([prompt + response])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.cat(rows)


def test_packed_responses_see_the_prompt_and_themselves_alone():
    model = float64_llama()
    logits, tokens = packed_logits(model, PROMPT, RESPONSES)
    expected = _one_by_one(model, [(PROMPT, response) for response in RESPONSES])
    assert logits.dtype == torch.float64
    assert tokens.tolist() == [token for response in RESPONSES for token in response]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-7)


def test_gradients_of_packed_responses_add_up():
    model = float64_llama()
    weights = torch.randn(12, model.config.vocab_size, generator=torch.Generator().manual_seed(0)).double()
    grads = []
    for logits in (
        packed_logits(model, PROMPT, RESPONSES)[0],
        _one_by_one(model, [(PROMPT, response) for response in RESPONSES]),
    ):
        model.zero_grad()
        (logits * weights).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for packed, plain in zip(*grads, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-6)


def test_rows_of_different_lengths_do_not_disturb_each_other():
    model = float64_llama()
    pairs = [Pair([3], [4, 5]), Pair(PROMPT, [7, 8, 9, 10, 11]), Pair([3, 4, 5, 6, 7, 8, 9], [10])]
    logits, tokens = response_logits(model, pairs)
    assert tokens.tolist() == [4, 5, 7, 8, 9, 10, 11, 10]
    expected = _one_by_one(model, [(pair.prompt, pair.response) for pair in pairs])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-7)
