"""Python numbers and float64 tensors keep their digits in every function, whatever PyTorch's default dtype is."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from lightning_rejuv import functional as F
from lightning_rejuv.metrics import PassAtK
from lightning_rejuv.weights.drift import Drift

F64 = torch.float64


@pytest.fixture(params=[torch.float32, torch.bfloat16], autouse=True)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def exact(number: float, digits: float = 1e-15) -> object:
    return pytest.approx(float(number), rel=digits, abs=1e-300)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 1), (7, 2, 3), (1000, 3, 100), (10_000, 1, 3)])
def test_pass_at_k(n, c, k):
    expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    for trials in (n, torch.tensor(n)):
        for solved in (c, torch.tensor(c)):
            found = F.pass_at_k(trials, solved, k)
            assert found.dtype == F64
            assert found.item() == exact(expected, 1e-11)


def test_the_threshold_of_success_is_not_rounded():
    metric = PassAtK(1, success_threshold=1 - 1e-9)
    metric.update(torch.tensor([[0, 1], [1, 1]]))
    assert metric.compute().item() == 0.75
    metric = PassAtK(1, success_threshold=2.0**25)
    metric.update(torch.tensor([[2**25, 2**25 + 1]]))
    assert metric.compute().item() == 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1 / 3])
def test_distributions(temperature):
    logits, base = normal(2, 5, 11), 0.3 * normal(2, 5, 7)

    def entropy(x: torch.Tensor) -> torch.Tensor:
        log_p = (x / torch.tensor(temperature, dtype=F64)).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    assert F.token_entropy(logits, temperature=temperature).item() == exact(entropy(logits).mean(), 1e-13)
    gap = (entropy(logits) - entropy(base)).abs().mean()
    assert F.entropy_gap(logits, base, temperature=temperature).item() == exact(gap, 1e-12)
    top = (logits / torch.tensor(temperature, dtype=F64)).softmax(-1).amax(-1).mean()
    assert F.top1_confidence(logits, temperature=temperature).item() == exact(top, 1e-13)


def test_sums_and_ratios_of_tensors():
    a, b = normal(31, 20)[1:], normal(30, 20).square()
    assert F.relative_drift(a, b).item() == exact((a - b).norm() / b.norm(), 1e-13)
    assert F.relative_drift(a, b, per="row").tolist() == [
        exact(v, 1e-13) for v in (a - b).norm(dim=1) / b.norm(dim=1)
    ]
    assert F.update_ratio(a, b).item() == exact((a - b).norm() / b.norm(), 1e-13)
    assert F.support_retention(a, b).item() == exact((a - b).sum(1).mean(), 1e-13)
    assert F.dormancy_scores(a).tolist() == [exact(v, 1e-13) for v in a.abs().sum(0) / a.abs().sum(0).mean()]
    sigma = torch.linalg.svdvals(a)
    p = sigma / sigma.sum()
    assert F.effective_rank(a).item() == exact((-(p * p.log()).sum()).exp(), 1e-11)
    assert F.stable_rank(a).item() == exact((sigma**2).sum() / sigma[0] ** 2, 1e-11)
    assert Drift(1e-3 + 1e-12, 1e-3).relative == exact(math.sqrt(1 + 1e-9), 1e-15)
    assert Drift(1e60, 1e60).relative == 1.0


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1 / 3])
def test_thresholds(threshold):
    """At a threshold, and one float64 beyond it."""
    beyond = math.nextafter(threshold, 1.0)
    pair = torch.tensor([[threshold, beyond]], dtype=F64)
    assert F.active_fraction(pair, threshold=threshold).item() == 0.5
    assert F.dormant_fraction(pair[0], tau=threshold).item() == 0.5
    assert F.drift_sparsity(pair, torch.zeros(1, 2, dtype=F64), tolerance=threshold).item() == 0.5
    gradient = torch.tensor([[threshold], [2 - threshold]], dtype=F64)  # scores sum up to two neurons
    assert F.gradient_dormancy(gradient, tau=threshold).item() == 0.5
    assert F.gradient_dormancy(gradient, tau=math.nextafter(threshold, 0.0)).item() == 0.0


def test_curvature():
    x = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
    closure = lambda: 0.3 * x[0] ** 2 + 0.1 * x[1] ** 2  # noqa: E731
    assert F.sharpness(closure, [x]).item() == exact(0.6, 1e-12)
    g = torch.tensor([0.6, 0.2], dtype=F64)
    step = torch.ones(2, dtype=F64) + 0.07 * g / g.norm()
    assert F.sam_gap(closure, [x], rho=0.07).item() == exact(
        0.3 * step[0] ** 2 + 0.1 * step[1] ** 2 - 0.4, 1e-13
    )
