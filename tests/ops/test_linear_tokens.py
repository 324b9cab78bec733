"""Token statistics from hidden states equal those of the logits, chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv import ops
from lightning_rejuv.ops import linear_tokens, reference


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(2, 7, 16, generator=generator),
        "weight": torch.randn(50, 16, generator=generator),
        "target": torch.randint(0, 50, (2, 7), generator=generator),
        "temperature": torch.rand(2, 7, generator=generator) + 0.5,
        "bias": torch.randn(50, generator=generator),
    }


def expected(problem):
    hidden, weight, bias = (problem[name].double() for name in ("hidden", "weight", "bias"))
    logits = hidden.flatten(0, 1) @ weight.t() + bias
    return reference.token_stats(logits, problem["target"].flatten(), problem["temperature"].flatten())


@pytest.mark.parametrize("chunk_size", [1, 4, 14, 1000])
@pytest.mark.parametrize("vocab_block", [7, 50, 8192])
def test_chunks_do_not_change_the_result(problem, chunk_size, vocab_block, monkeypatch):
    monkeypatch.setattr(linear_tokens, "VOCAB_BLOCK", vocab_block)
    found = ops.token_stats_from_hidden(**problem, chunk_size=chunk_size)
    stats, ids = expected(problem)
    for i, name in enumerate(("entropy", "logsumexp", "logprob", "top1_prob")):
        torch.testing.assert_close(getattr(found, name).flatten(), stats[i], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.top1_id.flatten(), ids)
    assert found.top1_id.shape == (2, 7)


def test_sixteen_bit_inputs_give_float32_logits_even_under_autocast(problem):
    """Logits rounded to bfloat16 would be wrong in the third digit."""
    problem = {
        key: value.bfloat16() if key in ("hidden", "weight") else value for key, value in problem.items()
    }
    stats, _ = expected(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.token_stats_from_hidden(**problem)
    torch.testing.assert_close(found.logprob.flatten(), stats[2], atol=1e-5, rtol=1e-5)


def test_without_target_bias_and_tokens():
    weight = torch.ones(4, 3)
    assert ops.token_stats_from_hidden(torch.ones(5, 3), weight).logprob is None
    empty = ops.token_stats_from_hidden(torch.ones(0, 3), weight, torch.ones(0).long())
    assert empty.entropy.shape == empty.logprob.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(50, 15)}, r"`weight` to have shape \[V, 16\].*but got \(50, 15\)"),
        ({"weight": torch.ones(0, 16)}, r"`weight` to have shape \[V, 16\]"),
        ({"bias": torch.ones(49)}, r"`bias` to have shape \(50,\) but got \(49,\)"),
        ({"chunk_size": 0}, "`chunk_size` to be a positive int but got 0"),
        ({"target": torch.ones(14).long()}, r"`target` to have shape \(2, 7\)"),
        ({"temperature": -2.0}, "`temperature` to be a positive float but got -2.0"),
        ({"hidden": torch.ones(2, 7, 16).int()}, "`hidden` to be a floating point tensor"),
    ],
)
def test_wrong_arguments(problem, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.token_stats_from_hidden(**{**problem, **change})
