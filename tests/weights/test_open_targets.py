"""What a model is pulled toward where the two vocabularies differ."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.neurons import find_decoder
from lightning_rejuv.weights.open_targets import open_targets
from tests.conftest import batch, shifted, tiny_llama


@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
@pytest.mark.parametrize("anchor", ["module", "state dict"])
def test_a_resized_vocabulary_is_compared_and_reset_with_the_models_own_new_tokens(anchor, quantity):
    """The anchor is run with the model's rows for the tokens that it does not have."""
    base = tiny_llama(vocab_size=23)
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(26)
    sft = shifted(larger, 0.05)
    data = batch(vocabulary=26)
    assert int(data["input_ids"].max()) >= 23
    there = copy.deepcopy(sft)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            there.get_parameter(name)[: len(parameter)].copy_(parameter)
        log_probs = there(**data).logits[:, :-1].double().log_softmax(-1)
        response = data["labels"][:, 1:] != -100
    expected = -(log_probs.exp() * log_probs).sum(-1)[response].mean()
    before = {name: p.detach().clone() for name, p in sft.named_parameters()}
    report = rejuvenate(
        sft,
        base if anchor == "module" else base.state_dict(),
        [data],
        alpha=1.0,
        reset=Reset(fraction=0.1, positions="entropy_gap", quantity=quantity),
        resize_vocabulary=True,
    )
    assert report.comparison is not None
    assert report.comparison.entropy_base == pytest.approx(float(expected), rel=1e-5)
    moved = 0
    for group in find_decoder(sft).groups:
        now, was, to = (
            m[group.parameter].detach()
            for m in (dict(sft.named_parameters()), before, dict(base.named_parameters()))
        )
        changed = (now != was).any(1 - group.dim).nonzero().flatten()
        moved += len(changed)
        assert torch.equal(now.index_select(group.dim, changed), to.index_select(group.dim, changed))
    assert moved == report.neurons_reset > 0


def test_only_an_anchor_of_the_models_class_is_run_in_its_place():
    """Equal names and shapes say nothing about what a module computes."""

    class Other(nn.Linear):
        def forward(self, input):
            return -super().forward(input)

    model, same, other = nn.Linear(3, 2), nn.Linear(3, 2), Other(3, 2)
    assert open_targets(model, same).reference is same
    assert open_targets(model, other).reference is None
    assert open_targets(other, same).reference is None


def test_the_peak_of_memory_is_in_bytes():
    """On the CPU it is the process's: the model, and an interpreter with torch."""
    model, base = (nn.Linear(2048, 2048, bias=False) for _ in range(2))
    peak = open_targets(model, base).peak_memory()
    if peak is None:
        pytest.skip("the system does not tell")
    assert 50e6 + 2 * 4 * 2048**2 < peak < 1e12
