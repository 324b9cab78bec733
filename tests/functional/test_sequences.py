"""Attention entropy and support retention: against loops."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rejuv.functional import attention_entropy, support_retention


def test_attention_entropy_against_a_loop():
    torch.manual_seed(0)
    attention = torch.randn(2, 3, 4, 5).softmax(-1)
    attention[..., 0] = 0.0  # a masked key
    attention /= attention.sum(-1, keepdim=True)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = []
    for head in range(3):
        rows = [attention[b, head, q].double() for b in range(2) for q in range(4) if mask[b, q]]
        expected.append(sum(-sum(a * math.log(a) for a in row.tolist() if a > 0) for row in rows) / len(rows))
    assert attention_entropy(attention, mask).tolist() == pytest.approx(expected, rel=1e-5)
    assert attention_entropy(attention.bfloat16(), mask).tolist() == pytest.approx(expected, rel=1e-2)


def test_attention_entropy_bad():
    with pytest.raises(ValueError, match="4 dimensions"):
        attention_entropy(torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="after the softmax"):
        attention_entropy(torch.full((1, 1, 2, 2), -1.0))
    with pytest.raises(ValueError, match=r"\(1, 2\).*got \(1, 3\)"):
        attention_entropy(torch.rand(1, 1, 2, 2), torch.ones(1, 3).bool())


def test_support_retention_sums_over_a_response_and_averages_over_responses():
    logp = torch.tensor([[-1.0, -2.0, -50.0], [-3.0, -50.0, -50.0]])
    base = torch.tensor([[-0.5, -0.5, math.nan], [-1.0, math.nan, -1.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert support_retention(logp, base, mask).item() == pytest.approx(((-0.5 - 1.5) + (-2.0)) / 2)
    longer = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)])
    pad = torch.zeros(1, 3)
    assert support_retention(torch.cat([logp, pad]), torch.cat([base, pad]), longer).item() == pytest.approx(
        -2.0
    )


def test_support_retention_bad():
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="same shape"):
        support_retention(a, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="selects none"):
        support_retention(a, a, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        support_retention(a, torch.full((2, 3), math.nan))
