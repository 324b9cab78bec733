"""What a refit refuses, what stops it, and what it warns of; the model is then as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_rejuv import Refit, Reset, rejuvenate
from tests.conftest import sharpened, tiny_llama
from tests.test_refit import RATE, data_of, state, unchanged


def _without_generate(model):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask=None):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    return Bare()


def _frozen(model):
    return model.requires_grad_(False)


REFUSED = {
    "a rate that is too large": (
        {"refit": Refit(20, 1e30)},
        None,
        "finite loss in the refit but got nan at step 2",
    ),
    "a rate that is too large for the only step": (
        {"refit": Refit(1, 1e30)},
        None,
        "finite loss in the refit but got nan after its last step. The model is as it was before. Set a learning rate",
    ),
    "nothing to train": ({}, _frozen, "all are frozen"),
    "float16": (
        {},
        lambda m: m.half(),
        "trained weights in bfloat16 or float32 for `refit` but .* in float16",
    ),
    "no calibration": ({"calibration": None}, None, "Expected calibration data for `refit` but got none"),
    "no samples": ({"sampler": lambda _: []}, None, "at least one sampled batch"),
    "a loss": (
        {"reset": Reset(fraction=0.1), "loss": lambda m, b: m(**b).loss},
        None,
        "no `refit` with `loss`",
    ),
    "not a Refit": ({"refit": 20}, None, "`refit` to be a `Refit` or None but got 20"),
}


@pytest.mark.parametrize(("changes", "make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_changes_nothing(changes, make, message):
    base = tiny_llama()
    model = sharpened(base)
    model = make(model) if make else model
    calibration, samples = data_of(base)
    options = {"calibration": calibration, "alpha": 0.5, "refit": Refit(2)}
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"exp_avg": torch.ones_like(parameter)}
    before = state(model)
    with pytest.raises(ValueError, match=message):
        rejuvenate(model, base, **{"sampler": lambda _: samples, **options, **changes}, optimizer=optimizer)
    assert unchanged(model, before)
    assert all(bool((s["exp_avg"] == 1).all()) for s in optimizer.state.values())


def test_a_gradient_that_is_not_finite_stops_it():
    base = tiny_llama()
    model = sharpened(base)
    calibration, samples = data_of(base)
    before = state(model)
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match="finite gradient in the refit but got (nan|inf) at step 1"):
        rejuvenate(model, base, calibration, alpha=0.5, refit=Refit(2), sampler=lambda _: samples)
    assert unchanged(model, before)


def test_a_loss_that_is_infinite_before_any_step_is_not_put_down_to_the_learning_rate():
    base = tiny_llama()
    model = sharpened(base)
    calibration, samples = data_of(base)
    before = state(model)
    said = int(samples[0]["input_ids"][0, -1])  # a token that the model's head masks out
    model.lm_head.register_forward_hook(
        lambda module, given, logits: logits.index_fill(-1, torch.tensor([said]), -math.inf)
    )
    message = (
        "but got inf before its first step. The model is as it was before. No step had been made by then"
    )
    options = {"alpha": 0.5, "refit": Refit(2), "sampler": lambda _: samples}
    with pytest.raises(ValueError, match=message):
        rejuvenate(model, base, calibration, **options)
    assert unchanged(model, before)


def test_an_interrupt_in_the_midst_leaves_the_model_as_it_was(monkeypatch):
    base = tiny_llama()
    model = sharpened(base)
    calibration, samples = data_of(base)
    before, calls = state(model), []

    def step(self, *_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        options = {"alpha": 0.5, "reset": Reset(fraction=0.1), "sampler": lambda _: samples}
        rejuvenate(model, base, calibration, refit=Refit(3, RATE), **options)
    assert unchanged(model, before)


def test_a_model_without_generate_needs_a_sampler():
    base = tiny_llama()
    model, anchor = _without_generate(sharpened(base)), _without_generate(base)
    calibration, samples = data_of(base)
    options = {"alpha": 0.5, "refit": Refit(2, RATE)}
    before = state(model)
    with pytest.raises(ValueError, match="Expected a `sampler` for `refit`"):
        rejuvenate(model, anchor, calibration, **options)
    assert unchanged(model, before)
    rejuvenate(model, anchor, calibration, **options, sampler=lambda _: samples)
    assert not unchanged(model, before)


def test_a_loss_that_rises_is_warned_of():
    base = tiny_llama()
    model = sharpened(base)
    calibration, samples = data_of(base)
    with pytest.warns(
        UserWarning, match="raised the loss that it descends, from .* learning rate 1 is too large"
    ):
        rejuvenate(
            model,
            base,
            calibration,
            alpha=0.5,
            refit=Refit(2, 1.0),
            sampler=lambda _: samples,
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "`steps` of `Refit` to be an integer of at least 1 but got 0"),
        ({"steps": 1.5}, "`steps` of `Refit` to be an integer of at least 1 but got 1.5"),
        ({"batch_size": True}, "`batch_size` of `Refit` to be an integer of at least 1 but got True"),
        ({"learning_rate": 0.0}, "`learning_rate` of `Refit` to be a finite number above 0 but got 0.0"),
        ({"learning_rate": math.nan}, "`learning_rate` of `Refit` to be a finite number above 0 but got nan"),
        (
            {"learning_rate": "1e-5"},
            "`learning_rate` of `Refit` to be a finite number above 0 but got '1e-5'",
        ),
    ],
)
def test_options_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        Refit(**given)
