"""Which tensors a kernel edits. What it makes of them: ``test_conformance_lerp.py``."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_rejuv.ops import lerp
from lightning_rejuv.weights.rounding import random_stream


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(lerp, "kernels_on", lambda device: True)


@pytest.mark.parametrize(
    ("dtype", "base_dtype", "can"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float32, False),  # PyTorch's own reads and writes as little
        (torch.float64, torch.bfloat16, False),
        (torch.bfloat16, torch.float64, False),
    ],
)
def test_kernels_lerp_half_types_and_mixtures(dtype, base_dtype, can):
    assert lerp.can_lerp(torch.ones(4, dtype=dtype), torch.ones(4, dtype=base_dtype)) is can


def test_what_memory_has_in_another_order_is_put_in_order_for_the_kernel(monkeypatch):
    def kernel(param, base, weight, key):
        assert param.is_contiguous()
        assert base.is_contiguous()
        return param.copy_(base).new_zeros(2, 1)

    monkeypatch.setitem(sys.modules, "lightning_rejuv.ops.triton_lerp", SimpleNamespace(lerp_=kernel))
    monkeypatch.setattr("lightning_rejuv.ops.triton_lerp", SimpleNamespace(lerp_=kernel), raising=False)
    matrix, base = torch.ones(4, 6, dtype=torch.bfloat16), torch.randn(6, 4).bfloat16()
    assert lerp.can_lerp(matrix, base.t())
    pointer = matrix.data_ptr()
    lerp.lerp_(matrix.t(), base, 0.5)
    assert torch.equal(matrix, base.t())
    assert matrix.data_ptr() == pointer
    assert not lerp.can_lerp(matrix[:0], matrix[:0])


def test_the_key_of_a_lerp_is_a_draw_from_the_stream(monkeypatch):
    keys = []
    fake = SimpleNamespace(lerp_=lambda param, base, weight, key: keys.append(key))
    monkeypatch.setitem(sys.modules, "lightning_rejuv.ops.triton_lerp", fake)
    monkeypatch.setattr("lightning_rejuv.ops.triton_lerp", fake, raising=False)
    half, wide = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    for name in ("a", "a", "b"):
        stream = random_stream(name)
        lerp.lerp_(half, half, 0.5, stream)
        lerp.lerp_(half, half, 0.5, stream)
    assert keys[:2] == keys[2:4]
    assert len(set(keys)) == 4
    assert all(1 << 62 <= key < 1 << 63 for key in keys)
    lerp.lerp_(half, half, 0.5)
    lerp.lerp_(wide, half, 0.5, random_stream("a"))
    assert keys[6:] == [None, None]
