"""What the monitor makes of the sums over activations."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.metrics.activations import activation_values
from lightning_rejuv.ops import activation_stats


@pytest.mark.parametrize("neurons", [1, 12, 35, 45, 55, 100])
def test_the_low_score_is_that_of_the_neuron_nearest_to_five_percent(neurons):
    h = torch.randn(3, neurons, generator=torch.Generator().manual_seed(neurons))
    totals, layers = activation_values({"site": torch.stack([*activation_stats(h)]).double()}, 0.025)
    means = h.double().abs().mean(0)
    rank = min(range(1, neurons + 1), key=lambda rank: abs(rank / neurons - 0.05))
    expected = sorted((means / means.mean()).tolist())[rank - 1]
    assert float(totals["dormancy_score_low"]) == pytest.approx(expected, rel=1e-5)
    assert layers["dormancy_score_low"] == {"site": pytest.approx(expected, rel=1e-5)}
