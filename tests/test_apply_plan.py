"""The random streams that an edit is rounded with: one for each parameter and step, whatever wraps the parameter."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_rejuv import rejuvenate
from lightning_rejuv.apply_plan import shift_all
from lightning_rejuv.config import Options
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
        assert not torch.equal(theirs, other), name
