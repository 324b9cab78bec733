"""Contributions against brute force: zeroing one neuron at a time, and finite differences."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution import Attribution
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.target_logit import attribute, check_reconstruction
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.neurons import find_decoder
from tests.conftest import batch, float64_llama


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
    return model, find_decoder(model), data


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


def test_the_reconstruction_error_is_the_largest_that_was_seen():
    found = Attribution()
    for error in ([0.0, 0.5], [0.1], [0.3, 0.0]):
        found.add([torch.ones(len(error), 2)], torch.tensor(error))
    assert found.error == 0.5
    assert found.positions == 5
    with pytest.raises(ValueError, match="reconstruction error is 5.0e-01"):
        check_reconstruction(found, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reconstruction_that_is_not_a_number_is_refused(dtype):
    with pytest.raises(ValueError, match="reconstruction error is nan"):
        check_reconstruction(Attribution(error=float("nan")), dtype)
