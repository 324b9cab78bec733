"""Sharpness against the dense Hessian; the SAM gap against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rejuv.functional import sam_gap, sharpness


def problem(seed: int = 0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    return net, lambda: (net(x) - y).square().mean()


@pytest.mark.parametrize("seed", range(3))
def test_largest_eigenvalue_of_the_dense_hessian(seed):
    net, closure = problem(seed)
    parameters = list(net.parameters())
    shapes = [p.shape for p in parameters]

    def loss_of(flat):
        pieces = flat.split([s.numel() for s in shapes])
        weights = {n: v.view(s) for (n, _), v, s in zip(net.named_parameters(), pieces, shapes, strict=True)}
        torch.manual_seed(seed)
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
        return (torch.func.functional_call(net, weights, (x,)) - y).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    assert loss_of(flat).item() == closure().item()
    largest = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_of, flat))[-1]
    assert sharpness(closure, parameters, iterations=40).item() == pytest.approx(largest.item(), rel=1e-6)
    assert sharpness(closure, parameters, iterations=3).item() <= largest.item()


def test_negative_curvature_is_not_mistaken_for_sharpness():
    # Power iteration would return -9, the largest in absolute value.
    x = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    value = sharpness(lambda: -4.5 * x[0] ** 2 + x[1] ** 2 + 0.5 * x[2] ** 2, [x])
    assert value.item() == pytest.approx(2.0)


def test_linear_loss_is_flat():
    x = torch.ones(3, requires_grad=True)
    assert sharpness(lambda: x.sum(), [x]).item() == 0.0


def test_it_begins_alike_whatever_the_default_device():
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    expected = sharpness(lambda: (weight**4).sum(), [weight])
    with torch.device("meta"):
        found = sharpness(lambda: (weight**4).sum(), [weight])
    assert torch.equal(found, expected)


def test_nothing_is_touched():
    net, closure = problem()
    closure().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in net.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        sharpness(closure, list(net.parameters()))
        sam_gap(closure, list(net.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    for parameter, (value, gradient) in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)


def test_sam_gap_by_definition():
    net, closure = problem()
    parameters = list(net.parameters())
    gradient = torch.autograd.grad(closure(), parameters)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    weights = {
        n: p.detach() + 0.1 * g / norm for (n, p), g in zip(net.named_parameters(), gradient, strict=True)
    }
    moved, start = problem()[0], closure().item()
    moved.load_state_dict(weights)
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    expected = (moved(x) - y).square().mean().item() - start
    assert sam_gap(closure, parameters, rho=0.1).item() == pytest.approx(expected, rel=1e-9)


def test_weights_are_put_back_after_an_error():
    x = torch.tensor([1.0], requires_grad=True)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no")
        return x.square().sum()

    with pytest.raises(RuntimeError, match="no"):
        sam_gap(closure, [x])
    assert x.item() == 1.0


def test_attention_has_a_second_derivative():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    q = list(attention.parameters())

    def closure():
        out = nn.functional.scaled_dot_product_attention(*(attention.in_proj_weight[:8] @ x.mT,) * 3)
        return out.square().mean()

    assert sharpness(closure, q, iterations=5) > 0


def test_bad_input():
    with pytest.raises(ValueError, match="require a gradient but got 1 that do not"):
        sharpness(lambda: torch.zeros(()), [torch.zeros(2)])
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"scalar but got shape \(2,\)"):
        sharpness(lambda: x * 2, [x])
    with pytest.raises(ValueError, match="`rho`"):
        sam_gap(lambda: x.sum(), [x], rho=0.0)
