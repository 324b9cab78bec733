"""The public functions of D: shapes, shards, precision, errors. Values: ``test_conformance_tokens.py``."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_rejuv import ops
from lightning_rejuv.ops import reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_against_torchs_own_functions():
    logits, target = 3 * torch.randn(2, 6, 50), torch.randint(0, 50, (2, 6))
    tau = torch.rand(2, 6) + 0.5
    found = ops.token_stats(logits, target, tau)
    scaled = logits.double() / tau.double().unsqueeze(-1)
    distribution = torch.distributions.Categorical(logits=scaled)
    loss = cross_entropy(scaled.flatten(0, 1), target.flatten(), reduction="none").view(2, 6)
    torch.testing.assert_close(found.entropy, distribution.entropy(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.logsumexp, scaled.logsumexp(-1), atol=0, rtol=1e-6)
    torch.testing.assert_close(found.logprob, -loss, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.top1_prob, scaled.softmax(-1).amax(-1), atol=0, rtol=2e-6)
    assert torch.equal(found.top1_id, logits.argmax(-1))


def test_single_row_and_no_target():
    found = ops.token_stats(torch.zeros(8))
    assert found.entropy.item() == pytest.approx(torch.tensor(8.0).log().item())
    assert found.entropy.shape == ()
    assert found.logprob is None


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_token(shape):
    found = ops.token_stats(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.int64))
    assert found.entropy.shape == shape[:-1]
    assert found.top1_id.shape == shape[:-1]


def test_logits_of_all_but_the_last_position_are_read_where_they_lie():
    logits, target = torch.randn(3, 9, 40), torch.randint(0, 40, (3, 9))
    found = ops.token_stats(logits[:, :-1], target[:, 1:], torch.rand(3, 9)[:, 1:] + 0.5)
    assert found.entropy.shape == (3, 8)
    found = ops.token_stats(logits[:, :-1], target[:, 1:])
    expected, ids = reference.token_stats(logits[:, :-1].reshape(-1, 40), target[:, 1:].reshape(-1))
    torch.testing.assert_close(found.logprob.flatten(), expected[2], atol=2e-6, rtol=1e-6)
    assert torch.equal(found.top1_id.flatten(), ids)


@pytest.mark.parametrize("level", [0.0, 30.0, 200.0])
def test_peaked_distributions_keep_their_digits(level):
    """Float32 logsumexp − Σp·x loses every digit here: its error is of the order of the level's rounding."""
    logits = 2 * torch.randn(16, 5000) + level
    logits[:, 0] = logits.amax(1) + 16
    expected = reference.token_stats(logits)[0][0]
    assert expected.max() < 2e-4
    torch.testing.assert_close(ops.token_stats(logits).entropy, expected, rtol=2e-2, atol=1e-9)


def test_entropy_is_never_negative():
    logits = torch.full((64, 3), -1e4)
    logits[torch.arange(64), torch.arange(64) % 3] = torch.linspace(-1e3, 1e3, 64)
    assert (ops.token_stats(logits).entropy >= 0).all()


def test_shards_merge_to_the_whole():
    logits, target, tau = 4 * torch.randn(2, 3, 30), torch.randint(0, 30, (2, 3)), torch.rand(2, 3) + 0.5
    whole = ops.token_stats(logits, target, tau)
    parts = [
        ops.token_partials(logits[..., a:b], target, tau, vocab_start=a) for a, b in ((0, 7), (7, 8), (8, 30))
    ]
    merged = ops.merge_token_stats(parts)
    for name in whole._fields:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name).flatten())
    assert ops.merge_token_stats(parts, has_target=False).logprob is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.ones(2, 3).long()}, "`logits` to be a floating point tensor"),
        ({"logits": torch.ones(2, 0)}, r"`logits` to have a vocabulary but got shape \(2, 0\)"),
        ({"target": torch.ones(2)}, "`target` to be an int64 tensor but got torch.float32"),
        ({"target": torch.ones(3).long()}, r"`target` to have shape \(2,\).*but got \(3,\)"),
        ({"temperature": -1.0}, "`temperature` to be a positive float but got -1.0"),
        ({"temperature": 0}, "`temperature` to be a positive float but got 0"),
        ({"temperature": float("inf")}, "`temperature` to be a positive float but got inf"),
        ({"temperature": float("nan")}, "`temperature` to be a positive float but got nan"),
        ({"temperature": torch.ones(2, 1)}, r"`temperature` to have shape \(2,\).*but got \(2, 1\)"),
        ({"target": torch.ones(2, device="meta").long()}, "`target` on the device of `logits`"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.token_stats(**{"logits": torch.ones(2, 3), **arguments})


def test_partials_that_do_not_belong_together():
    one, two = ops.token_partials(torch.ones(2, 3)), ops.token_partials(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"\(4, 2\) in entry 0, but got \(4, 4\) and \(4,\) in entry 1"):
        ops.merge_token_stats([one, two])
    with pytest.raises(ValueError, match="at least one shard"):
        ops.merge_token_stats([])


def test_autocast_does_not_round_what_is_computed():
    """The entropy's sum of products is what autocast would take in bfloat16."""
    logits = 3 * torch.randn(64, 500)
    target = torch.randint(0, 500, (64,))
    stats, _ = reference.token_stats(logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.token_stats(logits, target)
    for i, name in enumerate(("entropy", "logsumexp", "logprob", "top1_prob")):
        torch.testing.assert_close(getattr(found, name), stats[i], atol=1e-5, rtol=1e-5)
