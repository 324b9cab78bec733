"""Gradient dormancy of one optimizer step: which side of a weight is its neurons, and which weights have any."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rejuv.metrics.weights import GRADIENT_TAU, StepMeasures


def _scores(gradient, columns):
    """A neuron's mean |g| over the mean of all, in float64, entry by entry."""
    rows = gradient.T.tolist() if columns else gradient.tolist()
    sums = [sum(abs(entry) for entry in row) for row in rows]
    return [len(sums) * one / sum(sums) for one in sums]


def _dormant(scores):
    return sum(score <= GRADIENT_TAU for score in scores) / len(scores)


def test_what_writes_the_residual_stream_has_its_neurons_in_columns_and_a_kernel_has_none():
    model = nn.Module()
    model.mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)})
    model.self_attn = nn.ModuleDict({"o_proj": nn.Linear(5, 4, bias=False)})
    model.embed_tokens, model.conv = nn.Embedding(7, 4), nn.Conv1d(2, 3, 3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
        model.get_parameter(f"{name}.weight").grad[1] = 0  # a row of each, and two columns
        model.get_parameter(f"{name}.weight").grad[:, [0, 2]] = 0
    model.embed_tokens.weight.grad[2:] = 0
    expected = {
        f"{name}.weight": _scores(model.get_parameter(f"{name}.weight").grad, columns)
        for name, columns in {
            "mlp.up_proj": False,
            "mlp.down_proj": True,
            "self_attn.o_proj": True,
            "embed_tokens": False,
        }.items()
    }
    step = StepMeasures()
    step.before(model)
    assert step.layers == pytest.approx({name: _dormant(scores) for name, scores in expected.items()})
    assert step.layers["mlp.down_proj.weight"] == pytest.approx(2 / 6)
    pooled = _dormant([score for scores in expected.values() for score in scores])
    assert float(step.after(model)["gradient_dormancy"]) == pytest.approx(pooled)
