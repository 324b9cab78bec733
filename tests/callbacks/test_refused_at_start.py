"""What can be known of an anchor and a model at the start of a fit is refused there, before a step is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrizations

from lightning_rejuv import RejuvenationCallback
from tests.callbacks.modules import Line, fit, line_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def _float8(_module):
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in line_anchor().items()}


ANCHORS = {
    "the module": (lambda module: module.model, "shares its memory"),
    "the LightningModule": (lambda module: module, "shares its memory"),
    "its live state dict": (lambda module: module.model.state_dict(), "shares its memory"),
    "float8": (_float8, "16 bits or more"),
    "on the meta device": (lambda module: copy.deepcopy(module.model).to("meta"), "on the meta device"),
}


@pytest.mark.parametrize("kind", ANCHORS)
def test_anchors(tmp_path, kind):
    make, message = ANCHORS[kind]
    module = Line()
    before = copy.deepcopy(module.model.state_dict())
    callback = RejuvenationCallback(make(module), at_epoch=1, alpha=0.5)
    with pytest.raises(ValueError, match=message):
        fit(module, callback, tmp_path=tmp_path, max_epochs=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.model.state_dict().items())


def test_weights_that_are_computed(tmp_path):
    module = Line()
    parametrizations.weight_norm(module.model[2])
    callback = RejuvenationCallback(line_anchor(), at_epoch=1, alpha=0.5)
    with pytest.raises(ValueError, match=r"'model.2.weight \(WeightNorm\)'\] are computed from others"):
        fit(module, callback, tmp_path=tmp_path, max_epochs=2)


@pytest.mark.parametrize("alpha", [1, 0, torch.tensor(0.5)])
def test_numbers_of_any_kind(tmp_path, alpha):
    callback = RejuvenationCallback(line_anchor(), at_start=True, alpha=alpha)
    fit(Line(), callback, tmp_path=tmp_path, max_epochs=1)
    assert callback.report.alpha == float(alpha)
    assert callback.rejuvenated_at == [0]
