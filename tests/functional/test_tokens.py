"""Entropy, confidence and gap, against float64 arithmetic that is written another way; support retention by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_rejuv.functional import (
    entropy_gap,
    response_mask,
    support_retention,
    token_entropy,
    top1_confidence,
)


def reference(logits: torch.Tensor, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Entropy and largest probability by numpy in extended precision, from normalised probabilities."""
    x = logits.double().numpy().astype(np.longdouble) / temperature
    x = x - x.max(-1, keepdims=True)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p), 0)
    return (-terms.sum(-1)).astype(float), p.max(-1).astype(float)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_matches_reference(dtype, scale, temperature):
    logits = (torch.randn(3, 5, 71, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    entropy, top = reference(logits, temperature)
    found = token_entropy(logits, temperature=temperature, reduction="none")
    assert np.allclose(found, entropy, rtol=1e-5, atol=2e-6)
    assert np.allclose(top1_confidence(logits, temperature=temperature, reduction="none"), top, rtol=1e-5)
    assert token_entropy(logits, temperature=temperature).item() == pytest.approx(entropy.mean(), rel=1e-5)


@pytest.mark.parametrize("level", [0.0, 30.0, -120.0, 3e4])
def test_peaked_bfloat16_rows_keep_their_digits(level):
    # Rows as an over-trained model has them: H = 0.0079. bf16 log_softmax and unshifted fp32 both fail here.
    logits = torch.full((4, 1024), level - 14.0)
    logits[:, 3] = level
    logits = logits.to(torch.bfloat16) if level <= 30 else logits
    expected, _ = reference(logits)
    assert 0 < expected[0] < 0.05
    assert np.allclose(token_entropy(logits, reduction="none"), expected, rtol=2e-3 if level > 1e3 else 1e-4)
    x = logits.bfloat16()
    naive = -(x.log_softmax(-1).exp() * x.log_softmax(-1)).sum(-1).float()
    if level == 0.0:
        assert abs(naive[0].item() / expected[0] - 1) > 1e-3  # the trap is real


def test_masked_out_tokens_have_no_share():
    logits = torch.tensor([[1.0, 1.0, -math.inf], [2.0, -math.inf, -math.inf]])
    assert token_entropy(logits, reduction="none").tolist() == pytest.approx([math.log(2), 0.0])
    assert top1_confidence(logits, reduction="none").tolist() == pytest.approx([0.5, 1.0])


def test_mask_selects_and_is_not_read_elsewhere():
    logits = torch.randn(2, 4, 9)
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    logits[0, 1] = math.nan
    per_token = token_entropy(logits, mask, reduction="none")
    assert torch.isnan(per_token).tolist() == (~mask).tolist()
    assert token_entropy(logits, mask).item() == pytest.approx(per_token[mask].mean().item())
    assert token_entropy(logits, mask.long()).item() == token_entropy(logits, mask).item()


def test_entropy_is_averaged_over_tokens_not_sequences():
    logits = torch.zeros(2, 3, 4)
    logits[1, 0, 0] = 50.0
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert token_entropy(logits, mask).item() == pytest.approx(3 / 4 * math.log(4))


def test_gap_is_absolute_and_position_by_position():
    left, right = torch.randn(2, 6, 11), torch.randn(2, 6, 17)
    expected = np.abs(reference(left)[0] - reference(right)[0])
    assert np.allclose(entropy_gap(left, right, reduction="none"), expected, atol=1e-5)
    assert entropy_gap(left, right).item() == pytest.approx(expected.mean(), abs=1e-5)
    assert entropy_gap(left, left).item() == 0


def test_no_gradient_flows():
    logits = torch.randn(2, 5, requires_grad=True)
    assert not token_entropy(logits).requires_grad


@pytest.mark.parametrize("function", [token_entropy, top1_confidence])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "`temperature` to be a positive float but got -1.0"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
        (
            {"mask": torch.zeros(2, 3)},
            TypeError,
            "`mask` to be a bool or integer tensor but got",
        ),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"\(2, 3\).*but got \(2, 2\)"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, "selects none"),
        ({"reduction": "sum"}, ValueError, "`reduction` to be one of"),
    ],
)
def test_bad_arguments(function, kwargs, error, message):
    with pytest.raises(error, match=message):
        function(torch.zeros(2, 3, 4), **kwargs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits(bad):
    logits = torch.zeros(2, 3)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="finite logits .* at 1 positions"):
        token_entropy(logits)
    with pytest.raises(ValueError, match="finite logits"):
        token_entropy(torch.full((1, 3), -math.inf))
    with pytest.raises(TypeError, match=r"floating dtype but got torch.int64"):
        token_entropy(torch.zeros(2, 3, dtype=torch.long))


def test_gap_needs_the_same_positions():
    with pytest.raises(ValueError, match=r"same positions but got \(2, 3, 4\) and \(2, 2, 4\)"):
        entropy_gap(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4))


def test_response_mask_is_the_labels_shifted():
    labels = torch.tensor([[-100, 1, 2, -100], [3, -100, -100, 4]])
    expected = torch.tensor([[True, True, False, False], [False, False, True, False]])
    assert torch.equal(response_mask(labels), expected)
    with pytest.raises(TypeError, match="integer"):
        response_mask(labels.float())
    with pytest.raises(ValueError, match="B, T"):
        response_mask(labels[0])


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
