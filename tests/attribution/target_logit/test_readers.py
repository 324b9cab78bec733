"""Readers whose activations no module returns, against finite differences."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.target_logit import attribute
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.neurons import find_decoder
from tests.conftest import batch
from tests.families import tiny


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])  # experts with biases, and without
def test_an_experts_score_is_the_derivative_of_the_logit_by_its_gain(family):
    """Row and bias of a neuron of an expert are scaled together: its output is s * y."""
    model, step = tiny(family), 1e-2
    [data] = as_batches([batch(vocabulary=61)])
    row, time = 1, 6
    place = Positions(torch.tensor([row]), torch.tensor([time]), torch.tensor([0]), 0, 0)
    groups = find_decoder(model).groups
    result = attribute(model, find_decoder(model), [data], [place])
    compared = biased = 0
    for group, scores in zip(groups, result.total, strict=True):
        if group.expert is None or group.writes:
            continue
        best = scores.abs().argmax().reshape(1)
        if not scores[best]:
            continue  # no token reached the expert
        names = [(group.parameter, group.dim), *([(group.bias, 0)] if group.bias else [])]
        logits = []
        for gain in (1 + step, 1 - step):
            kept = {name: model.get_parameter(name).detach().clone() for name, _ in names}
            with torch.no_grad():
                for name, dim in names:
                    part = group.matrix(model.get_parameter(name))
                    part.index_copy_(dim, group.place(best), gain * part.index_select(dim, group.place(best)))
                logits.append(model(**data.inputs).logits[row, time, data.targets[row, time]])
                for name, value in kept.items():
                    model.get_parameter(name).copy_(value)
        slope = (logits[0] - logits[1]) / (2 * step)
        torch.testing.assert_close(scores[best][0], slope.double(), rtol=0.02, atol=1e-3)
        compared += 1
        biased += group.bias is not None
    assert compared >= 4
    assert (biased > 0) == (family == "gpt_oss")
