"""Drift, its sparsity and update size."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rejuv.functional import drift_sparsity, relative_drift, update_ratio


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_drift_matches_float64(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = (base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    base = base.to(torch.float32)
    w, b = weight.double(), base.double()
    expected = math.sqrt(((w - b) ** 2).sum().item() / (b**2).sum().item())
    assert relative_drift(weight, base).item() == pytest.approx(expected, rel=1e-5)
    assert update_ratio(weight, base).item() == relative_drift(weight, base).item()


def test_rows_and_columns():
    base, weight = torch.randn(4, 6), torch.randn(4, 6)
    rows = (weight - base).norm(dim=1) / base.norm(dim=1)
    columns = (weight - base).norm(dim=0) / base.norm(dim=0)
    assert torch.allclose(relative_drift(weight, base, per="row").float(), rows, rtol=1e-5)
    assert torch.allclose(relative_drift(weight, base, per="column").float(), columns, rtol=1e-5)


def test_a_turn_is_a_drift():
    # The difference of the norms, which another library reports, would be zero.
    assert relative_drift(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])).item() == pytest.approx(
        math.sqrt(2)
    )


def test_zero_base():
    assert relative_drift(torch.zeros(3), torch.zeros(3)).item() == 0.0
    assert relative_drift(torch.ones(3), torch.zeros(3)).item() == math.inf


def test_small_drift_of_large_weights():
    base = torch.full((1000,), 1000.0, dtype=torch.float64)
    weight = base + 1e-7
    assert relative_drift(weight, base).item() == pytest.approx(1e-10, rel=1e-4)


def test_sparsity_counts_coordinates():
    base = torch.zeros(10)
    weight = torch.tensor([0.0] * 6 + [1e-3, -1e-3, 1.0, math.nan])
    assert drift_sparsity(weight, base).item() == pytest.approx(0.6)
    assert drift_sparsity(weight, base, tolerance=1e-2).item() == pytest.approx(0.8)


@pytest.mark.parametrize("function", [relative_drift, drift_sparsity, update_ratio])
def test_bad_input(function):
    with pytest.raises(ValueError, match=r"same shape but got \(2, 3\) and \(3, 2\)"):
        function(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(TypeError, match="`weight` to be of a floating dtype but got torch.int8"):
        function(torch.zeros(2, dtype=torch.int8), torch.zeros(2))


def test_bad_options():
    with pytest.raises(ValueError, match="`per` to be one of"):
        relative_drift(torch.zeros(2, 2), torch.zeros(2, 2), per="cell")
    with pytest.raises(ValueError, match="matrix for `per='row'`"):
        relative_drift(torch.zeros(2), torch.zeros(2), per="row")
    with pytest.raises(ValueError, match="`tolerance`"):
        drift_sparsity(torch.zeros(2), torch.zeros(2), tolerance=-1.0)


def test_blocks_add_up_to_the_whole():
    # More elements than a block, of very different size; a float32 sum over all would lose the small ones.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2**18 + 77, generator=generator)
    weight = base + 1e-4 * torch.randn(base.shape, generator=generator)
    weight[:1000] = base[:1000]
    w, b = weight.double(), base.double()
    expected = ((w - b).square().sum() / b.square().sum()).sqrt().item()
    assert relative_drift(weight, base).item() == pytest.approx(expected, rel=5e-6)
    unmoved = int((weight == base).sum())
    assert drift_sparsity(weight, base).item() == unmoved / base.numel()
    assert drift_sparsity(weight, base, tolerance=1e-4).item() == int(((w - b).abs() <= 1e-4).sum()) / len(w)


def test_strided_weights():
    base, weight = torch.randn(6, 4).T, torch.randn(4, 12)[:, ::2]
    expected = (weight - base).norm() / base.norm()
    assert relative_drift(weight, base).item() == pytest.approx(expected.item(), rel=1e-5)
