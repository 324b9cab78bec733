"""What is decided before a weight changes, against the same decided by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.neurons import find_decoder
from tests.conftest import batch, greedy_batch, sharpened, tiny_llama


def _state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _log_probs(model, data):
    return model(input_ids=data["input_ids"]).logits[:, :-1].double().log_softmax(-1)


def _entropies(model, data):
    """[B, T - 1] token entropies, and where the response is."""
    log_probs = _log_probs(model, data)
    return -(log_probs.exp() * log_probs).sum(-1), data["labels"][:, 1:] != -100


def _best_neurons(model, base, data, places, count):
    """The neurons whose way to the base raises the entropy most, to first order, as (weight, number)."""
    parameters = dict(model.named_parameters())
    names = [group.parameter for group in find_decoder(model).groups]
    entropies, _ = _entropies(model, data)
    found = torch.autograd.grad(
        sum(entropies[row, time] for row, time in places), [parameters[n] for n in names]
    )
    scores = {}
    for group, gradient in zip(find_decoder(model).groups, found, strict=True):
        step = base.get_parameter(group.parameter).detach() - parameters[group.parameter].detach()
        gains = (gradient.double() * step.double()).sum(1 - group.dim)
        scores |= {(group.parameter, number): float(gain) for number, gain in enumerate(gains)}
    return set(sorted(scores, key=lambda key: -scores[key])[:count])


def test_the_entropy_is_attributed_in_the_fused_model():
    base = tiny_llama()
    sft = sharpened(base)
    data = greedy_batch(base, rows=4)
    with torch.no_grad():
        (ours, response), (theirs, _) = _entropies(sft, data), _entropies(base, data)
    gap = (ours - theirs).abs().masked_fill(~response, -1)
    places = list(enumerate(gap.argmax(1).tolist()))
    fused = copy.deepcopy(sft)
    rejuvenate(fused, base, alpha=0.3)
    options = {"alpha": 0.3, "reset": Reset(fraction=0.1, positions="entropy_gap")}
    unfused = _best_neurons(sft, base, data, places, 17)
    before = _state(fused)
    expected = _best_neurons(fused, base, data, places, 17)
    rejuvenate(sft, base, [data], **options)
    moved = set()
    for group in find_decoder(sft).groups:
        now, was = sft.get_parameter(group.parameter), before[group.parameter]
        rows = (now != was).any(1 - group.dim).nonzero().flatten().tolist()
        moved |= {(group.parameter, row) for row in rows}
    assert moved == expected != unfused


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 17), (0.05, 8), (0.001, 1)])  # of 168 neurons
def test_the_top_share_of_a_position_is_rounded(fraction, count):
    """One position alone: its union is its top share."""
    base = tiny_llama()
    data = batch(rows=1)
    reset = Reset(fraction, positions="entropy_gap", quantity="target_logit", budget="union")
    report = rejuvenate(sharpened(base), base, [data], alpha=1.0, reset=reset)
    assert report.neurons_total == 168
    assert report.neurons_reset == count


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "reset": Reset(fraction=0.1)},
        {"sampler": lambda _: [greedy_batch(tiny_llama(), seed=1)]},
        {"sampler": lambda _: [greedy_batch(tiny_llama(), seed=1)], "reset": Reset(fraction=0.1)},
    ],
    ids=["reset", "search", "both"],
)
def test_a_model_in_training_mode_is_measured_without_its_dropout(options):
    base = tiny_llama(attention_dropout=0.5)
    sft = sharpened(base)
    data = greedy_batch(sft, rows=4)
    with torch.no_grad():
        entropies, response = _entropies(sft, data)
        (of_the_base, _) = _entropies(base, data)
    sft.train()
    base.train()
    report = rejuvenate(sft, base, [data], **options)
    assert sft.training
    assert base.training
    with torch.no_grad():
        (after, _) = _entropies(sft.eval(), data)
    found = report.comparison
    assert found is not None
    for got, values in (
        (found.entropy_base, of_the_base),
        (found.entropy_before, entropies),
        (found.entropy_after, after),
    ):
        assert got == pytest.approx(float(values[response].mean()), rel=1e-5)
    assert (found.rule is None) == (found.sharpened is None) == ("reset" not in options)
    assert f"token entropy {found.entropy_before:.3f} -> {found.entropy_after:.3f} nats" in report.summary()
