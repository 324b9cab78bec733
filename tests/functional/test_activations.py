"""Dormancy, activity and gradient dormancy: against loops in float64, and the traps of others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rejuv.functional import (
    active_fraction,
    dormancy_scores,
    dormant_fraction,
    gradient_dormancy,
)


def loop_scores(h: torch.Tensor, mask: torch.Tensor | None = None) -> list[float]:
    rows = h.double().reshape(-1, h.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    means = [sum(abs(v) for v in rows[:, n].tolist()) / len(rows) for n in range(rows.shape[1])]
    layer = sum(means) / len(means)
    return [m / layer for m in means]


@pytest.mark.parametrize("shape", [(40, 7), (4, 10, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_reduce_over_all_leading_dimensions(shape, dtype):
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert dormancy_scores(h).tolist() == pytest.approx(loop_scores(h), rel=1e-5)


def test_padding_is_not_silence():
    h = torch.randn(2, 10, 6).relu() + 0.1
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 5:] = False
    clean = active_fraction(h[:, :5])
    h[:, 5:] = 0
    assert active_fraction(h, mask).item() == clean.item() == 1.0
    assert active_fraction(h).item() == 0.5  # the trap is real
    assert dormancy_scores(h, mask).tolist() == pytest.approx(loop_scores(h, mask))


def test_fraction_pools_neurons_not_layers():
    small, large = torch.tensor([0.0, 2.0]), torch.ones(98)
    assert dormant_fraction(torch.cat([small, large])).item() == pytest.approx(0.01)


def test_threshold_is_inclusive_and_tau_counts():
    scores = torch.tensor([0.0, 0.025, 0.1, 3.0], dtype=torch.float64)
    assert [dormant_fraction(scores, tau=t).item() for t in (0.0, 0.025, 0.1)] == [0.25, 0.5, 0.75]
    assert dormant_fraction(torch.zeros(0)).isnan()
    assert dormant_fraction(torch.tensor([float("nan"), 1.0])).isnan()


def test_silent_layer_scores_zero_throughout():
    assert dormancy_scores(torch.zeros(4, 3)).tolist() == [0.0, 0.0, 0.0]
    assert dormant_fraction(dormancy_scores(torch.zeros(4, 3))).item() == 1.0


@pytest.mark.parametrize(
    ("activation", "resolved"), [(nn.ReLU(), True), (nn.SiLU(), False), (nn.GELU(), False)]
)
def test_smooth_activations_are_never_dormant(activation, resolved):
    # A closed unit (pre-activation -3 +- .5) beside open ones: ReDo sees it under ReLU alone.
    torch.manual_seed(0)
    pre = torch.randn(4096, 8)
    pre[:, 0] = pre[:, 0] * 0.5 - 3
    scores = dormancy_scores(activation(pre))
    # Above: GELU's closed unit is at 0.004 / layer mean; tau = 0.0025 would be needed there.
    assert (dormant_fraction(scores, 0.0025).item() > 0) is resolved
    assert scores[0] == scores.min()


def test_gradient_dormancy_sees_a_closed_silu_unit():
    torch.manual_seed(0)
    up, down = nn.Linear(8, 6), nn.Linear(6, 3)
    with torch.no_grad():
        up.weight[2] = 0.0
        up.bias[2] = -40.0
    down(nn.functional.silu(up(torch.randn(64, 8)))).square().sum().backward()
    assert gradient_dormancy(up.weight.grad).item() == pytest.approx(1 / 6)
    assert gradient_dormancy(down.weight.grad, neurons="column").item() == pytest.approx(1 / 6)
    assert gradient_dormancy(up.weight.grad * 2.0**16).item() == pytest.approx(1 / 6)
    assert gradient_dormancy(torch.zeros(3, 4)).item() == 1.0


def test_gradient_dormancy_against_a_loop():
    g = torch.randn(50, 12, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 0, 50)[:, None]
    means = [row.double().abs().mean().item() for row in g]
    layer = sum(means) / len(means)
    assert gradient_dormancy(g).item() == pytest.approx(sum(m / layer <= 0.01 for m in means) / 50)
    assert gradient_dormancy(g).item() != gradient_dormancy(g, neurons="column").item()


def test_active_threshold():
    h = torch.tensor([[0.0, 0.05, -0.05, 1.0]])
    assert [active_fraction(h, threshold=t).item() for t in (0.0, 0.05, 0.5)] == [0.75, 0.25, 0.25]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dormancy_scores(torch.randn(4)), ValueError, r"\[\.\.\., N\] but got \(4,\)"),
        (lambda: dormancy_scores(torch.ones(4, 2).long()), TypeError, "floating"),
        (lambda: dormancy_scores(torch.randn(4, 2), torch.zeros(4).bool()), ValueError, "selects none"),
        (lambda: dormant_fraction(torch.randn(4, 2)), ValueError, "1 dimensions"),
        (
            lambda: dormant_fraction(torch.randn(4), tau=-1.0),
            ValueError,
            "`tau` to be a float >= 0 but got -1",
        ),
        (lambda: active_fraction(torch.randn(4, 2), threshold=-1.0), ValueError, "`threshold`"),
        (lambda: gradient_dormancy(torch.randn(4)), ValueError, "2 dimensions"),
        (lambda: gradient_dormancy(torch.randn(4, 2), neurons="cell"), ValueError, "`neurons` to be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
