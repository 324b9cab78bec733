"""The reference itself, against plain Python loops: the meaning that every back end is held to."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rejuv.ops import reference


def test_activation_stats_by_hand():
    h = torch.tensor([[1.0, -2.0], [0.0, 0.5], [-3.0, 9.0]])
    table = reference.activation_stats(h, torch.tensor([True, True, False]), eps=0.5)
    assert table.tolist() == [
        [1.0, 2.5],
        [1.0, -1.5],
        [1.0, 4.25],
        [1.0, 2.0],
        [1.0, 1.0],
        [1.0, 1.0],
        [2.0, 2.0],
    ]


def test_grad_activation_stats_by_hand():
    h, g = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[-1.0, 0.5], [2.0, 0.0]])
    table = reference.grad_activation_stats(h, g)
    assert table.tolist() == [[7.0, 1.0], [3.0, 0.5], [5.0, -1.0], [2.0, 2.0]]


def test_weight_drift_by_hand():
    rows, columns = reference.weight_drift(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]]))
    assert rows.tolist() == [[10.0], [25.0], [25.0], [3.0]]
    assert columns.tolist() == [[9.0, 1.0], [9.0, 16.0], [0.0, 25.0], [3.0, 1.0]]


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_token_stats_by_loops(tau):
    row, target = [1.0, -2.0, 0.5, -math.inf], 2
    weights = [math.exp(x / tau) for x in row]
    p = [w / sum(weights) for w in weights]
    expected = [-sum(q * math.log(q) for q in p if q), math.log(sum(weights)), math.log(p[target]), max(p)]
    for temperature in (tau, torch.tensor([tau])):
        stats, ids = reference.token_stats(torch.tensor([row]), torch.tensor([target]), temperature)
        assert stats.squeeze(1).tolist() == pytest.approx(expected, rel=1e-12)
        assert ids.tolist() == [0]
