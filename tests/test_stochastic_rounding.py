"""Stochastic rounding: one random stream for each parameter, the same wherever the parameter is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import rejuvenate

SIZE = 4096


def _net(*names):
    return nn.ParameterDict({name: nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16)) for name in names})


def _rounded(*names, seed=0, alpha=0.5, **more):
    """Halfway between 1 and the next number: each element is rounded up or down with equal probability."""
    base, sft = _net(*names), _net(*names)
    for parameter in base.values():
        parameter.data.fill_(1.0078125)
    rejuvenate(sft, base, alpha=alpha, reset_fraction=0, rounding="stochastic", seed=seed, **more)
    return {name: (parameter > 1).float() for name, parameter in sft.items()}


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
        rejuvenate(model, base, alpha=0.3, reset_fraction=0, rounding="stochastic", seed=seed)
        total += model["w"].detach().double()
    place = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert float(((total / 200 - exact) / place).abs().max()) < 5 * 0.5 / 200**0.5
