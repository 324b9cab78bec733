"""Contributions against brute force: zeroing one neuron at a time, and finite differences."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution.entropy_gradient import attribute_entropy
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.scores import attribute
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.neurons import take_apart
from tests.conftest import batch, float64_llama, sharpened, tiny_llama


def _one_position(row: int, time: int) -> list[Positions]:
    return [Positions(torch.tensor([row]), torch.tensor([time]), torch.tensor([0]), 0, 0)]


def _final(model, inputs):
    """Final residual stream and normed stream of a forward pass."""
    kept = {}
    handle = model.model.norm.register_forward_hook(lambda _m, args, out: kept.update(r=args[0], n=out))
    logits = model(**inputs).logits
    handle.remove()
    return kept["r"], logits


@pytest.fixture(scope="module")
def setting():
    model = float64_llama()
    [data] = as_batches([batch()])
    return model, take_apart(model), data


def test_the_contributions_add_up_to_the_logit(setting):
    model, decoder, data = setting
    result = attribute(model, decoder, [data], _one_position(1, 5))
    assert result.error < 1e-10
    with torch.no_grad():
        residual, logits = _final(model, data.inputs)
    actual = logits[1, 5, data.targets[1, 5]]
    r = residual[1, 5]
    scale = (r.square().mean() + model.config.rms_norm_eps).rsqrt()
    u = model.lm_head.weight[data.targets[1, 5]] * model.model.norm.weight * scale
    embedding = u @ model.model.embed_tokens(data.inputs["input_ids"][1, 5])
    written = sum(t.sum() for t, g in zip(result.total, decoder.groups, strict=True) if g.writes)
    torch.testing.assert_close(embedding + written, actual, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["o", "down"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_writers_contribution_is_what_the_frozen_logit_loses_without_it(setting, kind, layer):
    """Remove neuron j's term from the residual stream at the position, with everything else held."""
    model, decoder, data = setting
    row, time = 2, 6
    result = attribute(model, decoder, [data], _one_position(row, time))
    [number] = [i for i, g in enumerate(decoder.groups) if (g.kind, g.layer) == (kind, layer)]
    group = decoder.groups[number]
    module, kept = model.get_submodule(group.module), {}
    handle = module.register_forward_pre_hook(lambda _m, args: kept.update(a=args[0]))
    with torch.no_grad():
        residual, _ = _final(model, data.inputs)
        handle.remove()
        r, target = residual[row, time], data.targets[row, time]
        frozen = (r.square().mean() + model.config.rms_norm_eps).rsqrt()

        def logit(stream):
            return model.lm_head.weight[target] @ (model.model.norm.weight * stream * frozen)

        for j in range(group.count):
            removed = torch.zeros_like(kept["a"][row, time])
            removed[j] = kept["a"][row, time, j]
            loss = logit(r) - logit(r - module.weight @ removed)
            torch.testing.assert_close(result.total[number][j], loss, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["q", "k", "v", "gate", "up"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_readers_score_is_the_derivative_of_the_logit_by_its_gain(setting, kind, layer):
    """Gradient x activation, summed over the sequence, is d logit / d s when the neuron's output is s * y."""
    model, decoder, data = setting
    row, time, step = 1, 6, 1e-5
    result = attribute(model, decoder, [data], _one_position(row, time))
    [number] = [i for i, g in enumerate(decoder.groups) if (g.kind, g.layer) == (kind, layer)]
    module = model.get_submodule(decoder.groups[number].module)
    target = data.targets[row, time]

    @torch.no_grad()
    def logit(j, gain):
        def scale(_m, _args, out):
            out = out.clone()
            out[row, :, j] *= gain
            return out

        handle = module.register_forward_hook(scale)
        value = model(**data.inputs).logits[row, time, target]
        handle.remove()
        return value

    for j in range(decoder.groups[number].count):
        slope = (logit(j, 1 + step) - logit(j, 1 - step)) / (2 * step)
        torch.testing.assert_close(result.total[number][j], slope, rtol=1e-6, atol=1e-8)


def test_positions_of_one_response_are_kept_apart(setting):
    model, decoder, data = setting
    both = [Positions(torch.tensor([1, 1]), torch.tensor([4, 6]), torch.tensor([0, 1]), 0, 0)]
    joint = attribute(model, decoder, [data], both)
    first = attribute(model, decoder, [data], _one_position(1, 4))
    second = attribute(model, decoder, [data], _one_position(1, 6))
    assert joint.positions == 2
    for a, b, c in zip(joint.absolute, first.total, second.total, strict=True):
        torch.testing.assert_close(a, b.abs() + c.abs())
    for a, b, c in zip(joint.total, first.total, second.total, strict=True):
        torch.testing.assert_close(a, b + c)


def test_responses_of_a_batch_do_not_mix(setting):
    model, decoder, data = setting
    both = [Positions(torch.tensor([1, 2]), torch.tensor([4, 6]), torch.tensor([0, 0]), 0, 0)]
    joint = attribute(model, decoder, [data], both)
    first = attribute(model, decoder, [data], _one_position(1, 4))
    second = attribute(model, decoder, [data], _one_position(2, 6))
    for a, b, c in zip(joint.absolute, first.absolute, second.absolute, strict=True):
        torch.testing.assert_close(a, b + c)


def test_the_model_is_left_as_it_was(setting):
    model, decoder, data = setting
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    attribute(model, decoder, [data], _one_position(0, 3))
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert hooks == {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    attribute(model, decoder, [data], _one_position(0, 3))
    assert all(p.grad is None for p in model.parameters())


def test_the_entropys_gradients_are_given_up_as_soon_as_they_are_used(setting, monkeypatch):
    base, decoder, data = setting
    model, anchor = sharpened(base), dict(base.named_parameters())
    kept, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **more: kept.extend(grad(*args, **more)) or kept
    )
    result = attribute_entropy(
        model, decoder.groups, [data], _one_position(1, 5), lambda n: anchor[n].detach()
    )
    assert len(kept) == len({group.parameter for group in decoder.groups})
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
        groups, at = take_apart(model).groups, _one_position(1, 5)
        scores.append(attribute_entropy(model, groups, [data], at, lambda n: anchor[n].detach()).total)
        hook.remove()
    for expected, found in zip(*scores, strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(found, expected)
