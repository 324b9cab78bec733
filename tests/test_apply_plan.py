"""The random streams that an edit is rounded with: one for each parameter and step, whatever wraps the parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import rejuvenate
from lightning_rejuv.apply_plan import RejuvenationError, _read, apply_plan, shift_all
from lightning_rejuv.config import Options, Reset
from lightning_rejuv.neurons import NeuronGroup
from lightning_rejuv.ops import lerp
from lightning_rejuv.plan import GroupReset, Plan
from lightning_rejuv.weights.open_targets import open_targets
from tests.conftest import shifted

COUNT = 512
STEP = torch.finfo(torch.bfloat16).eps  # from 1 to the next number


def _numbers(value):
    """Parameters of one number each, without dimensions: also of these no two draw from one stream."""
    one = torch.tensor(value, dtype=torch.bfloat16)
    return nn.ParameterDict({f"p{n}": nn.Parameter(one.clone()) for n in range(COUNT)})


def test_a_refit_is_rounded_independently_of_the_fusion_before_it():
    """Each takes a number half a step on: with one stream for both, the same ones would go up twice."""
    base, fused, refitted = _numbers(1 + STEP), _numbers(1.0), _numbers(1.0)
    rejuvenate(fused, base, alpha=0.5)
    moves = {name: torch.tensor(STEP / 2) for name in refitted}
    shift_all(open_targets(refitted, base), moves, Options())
    up, again = (torch.stack([p.detach() > 1 for p in net.values()]).double() for net in (fused, refitted))
    sigma = (0.25 / COUNT) ** 0.5
    assert abs(float(up.mean()) - 0.5) < 5 * sigma
    assert abs(float(again.mean()) - 0.5) < 5 * sigma
    assert abs(float((up * again).mean()) - 0.25) < 5 * sigma


def test_a_compiled_submodule_is_rounded_as_the_plain_one_is():
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16()
    plain = shifted(base)
    model = copy.deepcopy(plain)
    model[1] = torch.compile(model[1])
    assert "1._orig_mod.weight" in dict(model.named_parameters())
    nearest = copy.deepcopy(plain)
    rejuvenate(nearest, base, alpha=0.3, rounding="nearest")
    for one in (plain, model):
        rejuvenate(one, base, alpha=0.3)
    pairs = zip(model.named_parameters(), plain.parameters(), nearest.parameters(), strict=True)
    for (name, ours), theirs, other in pairs:
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), name
        if theirs.dim() > 1:  # a bias is short enough to be rounded as to nearest by chance
            assert not torch.equal(theirs, other), name


@pytest.mark.skipif(lerp.kernels_on(torch.device("cpu")), reason="kernels edit the weights of this process")
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_nothing_waits_for_the_device_until_all_is_edited(rounding):
    """Parameters on ``meta``, which have no numbers to be waited for: the first look at one is after the last edit."""
    base = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    sft = shifted(base).bfloat16()
    targets = open_targets(sft, base).of_copy(copy.deepcopy(sft).to("meta"))
    group = NeuronGroup("0.weight", "0", "out", 0, dim=0, count=16, bias="0.bias")
    plan = Plan(0.4, dict.fromkeys(targets.fused, 0.4), [GroupReset(group, torch.tensor([1, 2]))])
    with pytest.raises(RejuvenationError, match=r"copy out of meta.*Edited by then: 8 of 8 parameters"):
        apply_plan(targets, plan, Options(alpha=0.4, reset=Reset(fraction=0.1), rounding=rounding))


def test_what_rounding_did_is_read_whatever_the_default_device_is():
    sums = [torch.ones(2, 3), torch.ones(2, 1, dtype=torch.float64)]
    with torch.device("meta"):
        total = _read(sums)
    assert total.tolist() == [4.0, 4.0]
