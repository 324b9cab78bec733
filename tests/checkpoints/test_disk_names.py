"""A selection of weights is kept small, and holds any mask."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rejuv.checkpoints.disk_names import pattern_of


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(7,), (5, 6), (3, 4, 5), (2, 3, 1, 4)]),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["rows", "columns", "any", "none"]),
)
def test_a_pattern_holds_any_mask(shape, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.3
    if kind == "rows":
        mask = mask[..., :1].expand(shape) if len(shape) > 1 else mask
    elif kind == "columns":
        mask = mask.reshape(-1, shape[-1])[:1].expand(math.prod(shape[:-1]), -1).reshape(shape)
    elif kind == "none":
        mask = torch.zeros(shape, dtype=torch.bool)
    pattern = pattern_of(mask)
    rows = mask.reshape(-1, shape[-1]) if len(shape) > 1 else mask.reshape(-1, 1)
    assert torch.equal(pattern.rows(0, len(rows)), rows)
    assert torch.equal(pattern.rows(1, 3), rows[1:3])
    assert pattern.count == int(mask.sum())
    if kind == "none" or (kind == "columns" and len(shape) > 1):
        assert len(pattern.kinds) == 1
