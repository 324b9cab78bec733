"""Every family: each neuron once, contributions that add up, and a reset that touches nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.target_logit import attribute
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.neurons import find_decoder
from lightning_rejuv.neurons.families import FAMILIES
from tests.conftest import batch, shifted
from tests.families import CONFIGS, tiny


def test_every_family_of_the_map_is_tested():
    assert {name.split("/")[0] for name in CONFIGS} == set(FAMILIES)
    assert len(FAMILIES) >= 20


@pytest.mark.parametrize("name", CONFIGS)
def test_every_neuron_is_covered_once(name):
    model = tiny(name)
    covered = {n: torch.zeros_like(p, dtype=torch.int64) for n, p in model.named_parameters()}
    decoder = find_decoder(model)
    for group in decoder.groups:
        view = group.matrix(covered[group.parameter])
        index = group.place(torch.arange(group.count))
        view.index_add_(group.dim, index, torch.ones_like(view.index_select(group.dim, index)))
        if group.bias is not None:
            view = group.matrix(covered[group.bias])
            view.index_add_(0, index, torch.ones_like(index))
    mapped = {group.parameter for group in decoder.groups} | {g.bias for g in decoder.groups if g.bias}
    for n in mapped:
        latent = n.endswith("kv_a_proj_with_mqa.weight")  # its latent rows are no neurons
        assert (covered[n] <= 1).all()
        assert latent or (covered[n] == 1).all(), n
    kinds = {g.kind for g in decoder.groups}
    assert kinds in ({"q", "k", "v", "o", "gate", "up", "down"}, {"q", "k", "v", "o", "up", "down"})
    assert {g.layer for g in decoder.groups} == {0, 1}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_contributions_reconstruct_the_logit(name):
    model = tiny(name)
    [data] = as_batches([batch(vocabulary=61)])
    positions = Positions(torch.tensor([0, 1, 2]), torch.tensor([4, 5, 6]), torch.tensor([0, 0, 0]), 0, 0)
    result = attribute(model, find_decoder(model), [data], [positions])
    assert result.error < 1e-4
    assert all(bool(t.isfinite().all()) for t in result.total)
    for kind in ("q", "k", "v", "o", "up", "down"):
        groups = [
            t for t, g in zip(result.absolute, find_decoder(model).groups, strict=True) if g.kind == kind
        ]
        assert sum(float(t.sum()) for t in groups) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reset_returns_whole_neurons_and_nothing_else(name):
    base = tiny(name)
    sft = shifted(base, 0.05)
    before = {n: p.detach().clone() for n, p in sft.named_parameters()}
    anchor = dict(base.named_parameters())
    fused = copy.deepcopy(sft)
    rejuvenate(fused, base, alpha=0.0)
    assert all(torch.equal(p, anchor[n]) for n, p in fused.named_parameters())

    data = [batch(vocabulary=61)]
    report = rejuvenate(sft, base, data, alpha=1.0, reset=Reset(fraction=0.1, positions="entropy_gap"))
    assert 0 < report.neurons_reset <= round(0.1 * report.neurons_total)
    expected = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in sft.named_parameters()}
    moved = 0
    for group in find_decoder(sft).groups:
        now, was = (group.matrix(s[group.parameter]) for s in (dict(sft.named_parameters()), before))
        changed = group.own((now != was).any(1 - group.dim)).nonzero().flatten()
        moved += len(changed)
        index = group.place(changed)
        group.matrix(expected[group.parameter]).index_fill_(group.dim, index, True)
        if group.bias is not None:
            group.matrix(expected[group.bias]).index_fill_(0, index, True)
    assert moved == report.neurons_reset
    for n, p in sft.named_parameters():
        assert torch.equal(p[expected[n]], anchor[n][expected[n]])
        assert torch.equal(p[~expected[n]], before[n][~expected[n]])


def test_an_unknown_family_is_refused_by_name():
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2))
    with pytest.raises(ValueError, match="does not know the family 'rwkv'"):
        find_decoder(model)


def test_a_known_family_with_unknown_weights_is_refused():
    model = tiny("llama")
    model.model.layers[0].self_attn.adapter = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"does not expect \['model.layers.0.self_attn.adapter.weight'\]"):
        find_decoder(model)
