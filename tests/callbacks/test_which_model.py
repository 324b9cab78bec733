"""Which of the models in a LightningModule is rejuvenated."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import RejuvenationCallback, Reset, rejuvenate
from tests.callbacks.modules import Calibrated, Line, Snapshots, equal, fit, line_anchor
from tests.conftest import sharpened, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def test_the_policy_is_told_from_a_frozen_reference(tmp_path):
    base = tiny_llama()
    sft = sharpened(base)
    module = Calibrated(copy.deepcopy(sft), base)
    module.reference = copy.deepcopy(sft).requires_grad_(False)
    callback = RejuvenationCallback(base, at_start=True, alpha=0.4, reset=Reset(fraction=0.1))
    snapshots = Snapshots()
    fit(module, callback, snapshots, tmp_path=tmp_path, max_epochs=1)
    expected = copy.deepcopy(sft)
    rejuvenate(expected, base, module._data[:2], alpha=0.4, reset=Reset(fraction=0.1))
    assert equal(snapshots.taken[0], expected.state_dict())
    assert equal(module.reference.state_dict(), sft.state_dict())


def test_a_module_says_which_of_several_is_the_model(tmp_path):
    class WithCritic(Line):
        def __init__(self):
            super().__init__()
            self.critic = torch.nn.Linear(1, 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    class Named(WithCritic):
        @property
        def language_model(self):
            return self.model

    options = {"at_start": True, "alpha": 0.4}
    with pytest.raises(ValueError, match="says which one that is: by an attribute `language_model`"):
        fit(WithCritic(), RejuvenationCallback(line_anchor(), **options), tmp_path=tmp_path)
    callback = RejuvenationCallback(line_anchor(), **options)
    fit(Named(), callback, tmp_path=tmp_path)
    assert callback.rejuvenated_at == [0]
