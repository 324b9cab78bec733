"""How sure a model is: means over tokens and responses, however they lie in batches; half-precision logits."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution.confidence import Confidence, confidence, mean_entropy, nll_per_response
from lightning_rejuv.calibration.batches import Batch, as_batches
from tests.conftest import batch, tiny_llama

NAN = float("nan")


def test_every_token_and_every_response_counts_alike():
    """One response of one token in a batch of its own, and three of two tokens in another."""
    one = Confidence(torch.tensor([[NAN, 4.0]]), torch.tensor([[NAN, -8.0]]))
    three = Confidence(torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[-1.0, -2.0]] * 3))
    assert mean_entropy([one, three]) == pytest.approx((4 + 3 * (1 + 2)) / 7)
    assert nll_per_response([one, three]) == pytest.approx((8 + 3 * 3) / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_half_types_are_taken_through_float32(dtype, scale):
    """Of a plain head from the hidden states; of a model that makes something else of them from its logits."""
    model = tiny_llama(dtype=dtype)
    [data] = as_batches([batch()])
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
    if scale != 1:
        model.lm_head.register_forward_hook(lambda _m, _args, logits: logits * scale)
    found = confidence(model, data)
    handle.remove()
    with torch.no_grad():
        logits = seen[0] @ model.lm_head.weight.double().t() if scale == 1 else model(**data.inputs).logits
    log_probs = logits[:, :-1].double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    target = log_probs.gather(2, data.targets[..., None])[..., 0]
    for got, exact in ((found.entropy, entropy), (found.log_prob, target)):
        torch.testing.assert_close(got[data.response].double(), exact[data.response], rtol=1e-5, atol=1e-6)
        assert bool(got[~data.response].isnan().all())


@pytest.mark.parametrize("token", [-3, 5, 9])
def test_a_token_without_a_logit_is_refused(token):
    """Of such a token `token_stats` gives NaN, which the means would leave out."""

    class FiveTokens(torch.nn.Module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, 5)

    ids = torch.tensor([[1, 2, token, 4]])
    batch = Batch({"input_ids": ids}, ids[:, 1:], torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"it returns 5 for token {token}"):
        confidence(FiveTokens(), batch)
    ids[0, 2] = 4
    assert confidence(FiveTokens(), batch).log_prob.isfinite().all()
