"""Writers whose input no module is given, against brute force: one column of an expert removed at a time."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.target_logit import attribute
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.neurons import find_decoder
from tests.conftest import batch
from tests.families import tiny


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])  # stored as [in, out], and as [out, in]
def test_an_experts_contribution_is_what_the_frozen_logit_loses_without_it(family):
    """In the last layer, where nothing but the final norm comes after it."""
    model = tiny(family)
    [data] = as_batches([batch(vocabulary=61)])
    row, time = 1, 6
    place = Positions(torch.tensor([row]), torch.tensor([time]), torch.tensor([0]), 0, 0)
    decoder = find_decoder(model)
    result = attribute(model, decoder, [data], [place])
    target, norm, kept = data.targets[row, time], model.model.norm, {}
    handle = norm.register_forward_hook(lambda _m, args, out: kept.update(stream=args[0], normed=out))

    @torch.no_grad()
    def final():
        model(**data.inputs)
        return kept["stream"][row, time].double()

    stream = final()
    direction = model.lm_head.weight[target].double() * (kept["normed"][row, time].double() / stream)
    reached = 0
    for group, scores in zip(decoder.groups, result.total, strict=True):
        assert scores.shape == (group.count,)
        if group.expert is None or not group.writes or group.layer != 1:
            continue
        parameter = model.get_parameter(group.parameter)
        whole = parameter.detach().clone()
        lost = []
        for neuron in range(group.count):
            with torch.no_grad():
                group.matrix(parameter).index_fill_(group.dim, group.place(torch.tensor([neuron])), 0.0)
                lost.append(direction @ (stream - final()))
                parameter.copy_(whole)
        torch.testing.assert_close(scores, torch.stack(lost).detach(), rtol=1e-3, atol=1e-4)
        reached += bool(scores.any())
    handle.remove()
    assert reached == 2  # of the experts, those that the token was sent to
