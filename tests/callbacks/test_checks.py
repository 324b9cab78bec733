"""What can be known of a model, an anchor and data when a fit starts is refused then, before a batch is trained on."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn.utils import parametrizations

from lightning_rejuv import RejuvenationCallback, Reset
from tests.callbacks.modules import Calibrated, Line, fit, line_anchor
from tests.conftest import sharpened, tiny_llama
from tests.weights.test_optimizer_weights import Hidden

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


class Counted(Calibrated):
    def __init__(self, *args):
        super().__init__(*args)
        self.seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return super().training_step(batch, batch_idx)


def _with_nan(base):
    state = copy.deepcopy(base.state_dict())
    state["lm_head.weight"][3, 2] = float("nan")
    return state


def _hidden(module):
    module.configure_optimizers = lambda: Hidden(module.parameters())


def _clones(module):
    clones = [p.detach().clone().requires_grad_() for p in module.parameters()]
    module.configure_optimizers = lambda: torch.optim.SGD(clones, lr=0.1)


def _shared_count(module):
    module.configure_optimizers = lambda: torch.optim.SGD(
        [{"params": list(module.parameters()), "betas": (0.9, 0.999), "k": 0}], lr=0.1
    )


CASES = {
    "an anchor with NaN": (_with_nan, {}, None, "the anchor .* holds NaN or infinity in .*lm_head"),
    "copies in the optimizer": (None, {}, _hidden, r"Hidden\.main_groups"),
    "an optimizer of clones": (None, {}, _clones, "steps others, which holds clones"),
    "one step count": (None, {"optimizer_state": "reset"}, _shared_count, "share one step count"),
    "a pattern that fits nothing": (None, {"alpha": {"head.*": 0.5, "*": 0.4}}, None, "no parameter fits"),
    "a token that the model lacks": (
        None,
        {"calibration": [{"input_ids": torch.full((1, 4), 99), "labels": torch.full((1, 4), 99)}]},
        None,
        "model's vocabulary of 23 but got 99",
    ),
    "no calibration batch": (None, {"calibration": []}, None, "at least one calibration batch"),
}


@pytest.mark.parametrize(("anchor", "options", "change", "message"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("moment", [{"at_epoch": 1}, {"at_end": True}])
def test_it_is_refused_at_the_start(anchor, options, change, message, moment, tmp_path):
    base = tiny_llama()
    module = Counted(sharpened(base), base)
    if change is not None:
        change(module)
    options = {"alpha": 0.3, "reset": Reset(fraction=0.1), **options}
    callback = RejuvenationCallback(base if anchor is None else anchor(base), **moment, **options)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(module, callback, tmp_path=tmp_path, max_epochs=2)
    assert module.seen == 0


def test_training_may_start_from_the_anchor_itself(tmp_path):
    base = tiny_llama()
    module = Counted(copy.deepcopy(base), base)
    callback = RejuvenationCallback(base, at_end=True, alpha=0.3)
    fit(module, callback, tmp_path=tmp_path, max_epochs=1)
    assert callback.rejuvenated_at == [4]


def test_a_refusal_at_the_moment_does_not_mark_the_run_as_half_edited(tmp_path):
    """An optimizer may come to hold weights only after its first step."""

    class Late(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.kept = [p.detach().clone() for g in self.param_groups for p in g["params"]]
            return loss

    base = tiny_llama()
    module = Counted(sharpened(base), base)
    module.configure_optimizers = lambda: Late(module.parameters(), lr=0.1)
    callback = RejuvenationCallback(base, at_epoch=1, alpha=0.3)
    with pytest.raises(ValueError, match=r"Late\.kept"):
        fit(module, callback, tmp_path=tmp_path, max_epochs=2)
    assert module.seen == 4
    state = callback.state_dict()
    assert (state["editing"], state["armed"]) == (False, True)


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


@pytest.mark.parametrize("whose", ["model", "anchor"])
def test_buffers_that_are_not_finite_are_refused_at_the_start(whose, tmp_path):
    class Buffered(Line):
        seen = 0

        def training_step(self, batch, batch_idx):
            self.seen += 1
            return super().training_step(batch, batch_idx)

    module, anchor = Buffered(), {**line_anchor(), "scale": torch.ones(2)}
    module.model.register_buffer("scale", torch.ones(2))
    (module.model.scale if whose == "model" else anchor["scale"])[1] = float("inf")
    with pytest.raises(ValueError, match=rf"finite buffers but the {whose}.* in \['model.scale'\]"):
        fit(module, RejuvenationCallback(anchor, at_end=True, alpha=0.3), tmp_path=tmp_path, max_epochs=1)
    assert module.seen == 0
