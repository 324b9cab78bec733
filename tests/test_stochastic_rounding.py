"""Stochastic rounding, the default: one random stream for each parameter, the same wherever the parameter is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import rejuvenate
from lightning_rejuv.neurons import NeuronGroup
from lightning_rejuv.weights.edit import reset_neurons
from lightning_rejuv.weights.rounding import random_stream
from lightning_rejuv.weights.shard import Shard

SIZE = 4096


def _net(*names, dtype=torch.bfloat16):
    return nn.ParameterDict({name: nn.Parameter(torch.ones(SIZE, dtype=dtype)) for name in names})


def _rounded(*names, seed=0, alpha=0.5, dtype=torch.bfloat16, **more):
    """Halfway between 1 and the next number: each element is rounded up or down with equal probability."""
    base, sft = _net(*names, dtype=dtype), _net(*names, dtype=dtype)
    for parameter in base.values():
        parameter.data.fill_(1 + torch.finfo(dtype).eps)
    rejuvenate(sft, base, alpha=alpha, seed=seed, **more)
    return {name: (parameter > 1).float() for name, parameter in sft.items()}


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_the_two_are_one_step_apart_the_mean_is_alpha_of_the_way(dtype, alpha):
    """To nearest every weight is the base's below one half, and the model's above."""
    base_share = float(_rounded("a", alpha=alpha, dtype=dtype)["a"].double().mean())
    assert abs(base_share - (1 - alpha)) < 5 * (alpha * (1 - alpha) / SIZE) ** 0.5
    nearest = _rounded("a", alpha=alpha, dtype=dtype, rounding="nearest")["a"]
    assert set(nearest.tolist()) == {float(alpha < 0.5)}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_and_what_sft_did_not_change_stay_bit_for_bit(alpha):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    ours[::2] = theirs[::2]
    ours[0] = theirs[0] = -0.0
    for share in (alpha, 0.3):
        base, sft = (nn.ParameterDict({"w": nn.Parameter(tensor.clone())}) for tensor in (theirs, ours))
        rejuvenate(sft, base, alpha=share)
        expected = ours if share == 1 else theirs
        rows = slice(None) if share == alpha else slice(None, None, 2)
        assert torch.equal(sft["w"][rows].view(torch.int16), expected[rows].view(torch.int16))


def test_two_parameters_are_rounded_independently_of_each_other():
    ups = _rounded("a", "b", "c")
    for up in ups.values():
        assert float(up.mean()) == pytest.approx(0.5, abs=0.04)
    for one, other in (("a", "b"), ("b", "c"), ("a", "c")):
        both = float((ups[one] * ups[other]).mean())
        assert both == pytest.approx(0.25, abs=0.03)  # 0.5 with one stream for all, and 0 with opposite ones


def test_a_parameters_stream_does_not_depend_on_the_others():
    alone, among = _rounded("b"), _rounded("a", "b")
    assert torch.equal(alone["b"], among["b"])
    some = _rounded("a", "b", alpha={"a": 1.0, "b": 0.5})
    assert torch.equal(some["b"], alone["b"])
    assert float(some["a"].sum()) == 0


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**44, 2**64 - 1])
def test_every_seed_has_a_stream_of_its_own(seed):
    ups = _rounded("a", seed=seed)["a"]
    assert torch.equal(ups, _rounded("a", seed=seed)["a"])
    assert float((ups * _rounded("a", seed=5)["a"]).mean()) == pytest.approx(0.25, abs=0.03)


def test_the_expectation_is_the_fusion_in_float64():
    generator = torch.Generator().manual_seed(0)
    base = nn.ParameterDict({"w": nn.Parameter(torch.randn(64, 64, generator=generator).bfloat16())})
    sft = copy.deepcopy(base)
    with torch.no_grad():
        sft["w"] += (0.004 * torch.randn(64, 64, generator=generator)).bfloat16()
    exact = 0.3 * sft["w"].detach().double() + 0.7 * base["w"].detach().double()
    total = torch.zeros(64, 64, dtype=torch.float64)
    for seed in range(200):
        model = copy.deepcopy(sft)
        rejuvenate(model, base, alpha=0.3, seed=seed)
        total += model["w"].detach().double()
    place = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert float(((total / 200 - exact) / place).abs().max()) < 5 * 0.5 / 200**0.5


def test_a_copy_that_the_optimizer_holds_is_rounded_as_its_parameter_is():
    base, sft = _net("a"), _net("a")
    sft["a"].data.normal_()
    base["a"].data.copy_(sft["a"] * 1.01)
    optimizer = torch.optim.ASGD(sft.parameters(), lr=0.0)
    sft["a"].grad = torch.zeros_like(sft["a"])
    optimizer.step()
    average = optimizer.state[sft["a"]]["ax"]
    assert torch.equal(average, sft["a"])
    nearest = torch.lerp(sft["a"], base["a"], 0.5)
    rejuvenate(sft, base, alpha=0.5, optimizer=optimizer)
    assert not torch.equal(sft["a"], nearest)
    assert torch.equal(optimizer.state[sft["a"]]["ax"], sft["a"])


def test_neurons_that_are_reset_in_part_are_that_part_of_the_way():
    """Rows at one step from the base, with a quarter of the base: to nearest they would stay."""
    weight, base = torch.ones(8, SIZE).bfloat16(), torch.full((8, SIZE), 1.0078125).bfloat16()
    group = NeuronGroup("w", "", "out", 0, dim=0, count=8)
    rows = torch.tensor([1, 5])
    reset_neurons(Shard.whole(weight), base, group, 0, rows, 0.25, random_stream("rows"))
    up = (weight > 1).double().mean(1)
    assert set(up[[0, 2, 3, 4, 6, 7]].tolist()) == {0.0}
    assert up[rows].tolist() == pytest.approx([0.25] * 2, abs=5 * (0.25 * 0.75 / SIZE) ** 0.5)
