"""The entropy's gradient: memory while it is taken, and tokens that a model masks out."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution.entropy_gradient import attribute_entropy
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.neurons import find_decoder
from tests.conftest import batch, float64_llama, sharpened, tiny_llama


def _one_position(row: int, time: int) -> list[Positions]:
    return [Positions(torch.tensor([row]), torch.tensor([time]), torch.tensor([0]), 0, 0)]


def test_the_entropys_gradients_are_given_up_as_soon_as_they_are_used(monkeypatch):
    base, (data,) = float64_llama(), as_batches([batch()])
    groups = find_decoder(base).groups
    model, anchor = sharpened(base), dict(base.named_parameters())
    kept, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **more: kept.extend(grad(*args, **more)) or kept
    )
    result = attribute_entropy(model, groups, [data], _one_position(1, 5), lambda n: anchor[n].detach())
    assert len(kept) == len({group.parameter for group in groups})
    assert all(gradient.untyped_storage().nbytes() == gradient.element_size() for gradient in kept)
    assert all(bool(total.any()) for total in result.total)
    assert not any(p.grad is not None or p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_a_model_masks_out_add_nothing_to_the_entropy(dtype):
    """A logit of -inf, as for the padding of a vocabulary, is one of -1e4: its probability is 0."""
    base = tiny_llama(dtype=dtype)
    model, (data,) = sharpened(base), as_batches([batch(vocabulary=20)])
    anchor, scores = dict(base.named_parameters()), []
    for masked in (-1e4, -torch.inf):
        hook = model.lm_head.register_forward_hook(
            lambda _m, _a, out, v=masked: out.masked_fill(torch.arange(23) >= 20, v)
        )
        groups, at = find_decoder(model).groups, _one_position(1, 5)
        scores.append(attribute_entropy(model, groups, [data], at, lambda n: anchor[n].detach()).total)
        hook.remove()
    for expected, found in zip(*scores, strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(found, expected)
