"""What a caller brings and nothing would be done with, or what is missing: refused before a weight changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rejuv import Refit, Reset, rejuvenate
from lightning_rejuv.config import Options
from lightning_rejuv.data import Data
from tests.conftest import sharpened, tiny_llama
from tests.test_rejuvenate import _state, calibration


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


def unasked(*_):
    raise AssertionError("it is called")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verifier": unasked}, r'no `verifier` without `alpha="auto"`, .* no effect\. Leave it out'),
        ({"verifier": unasked, "refit": Refit(2)}, "no `verifier` without"),
        ({"sampler": unasked}, r'no `sampler` without `alpha="auto"` or `refit`'),
        ({"sampler": unasked, "reset": Reset(fraction=0.1)}, "no `sampler` without"),
        ({}, r'no `calibration` without `alpha="auto"`, a `reset` or a `refit`'),
        ({"loss": unasked}, "no `loss` without a `reset`"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(pair, options, message):
    base, sft = pair
    before = _state(sft)
    with pytest.raises(ValueError, match=f"Expected {message}"):
        rejuvenate(sft, base, calibration(base), **{"alpha": 0.4, **options})
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())


@pytest.mark.parametrize("name", ["sampler", "verifier", "loss"])
@pytest.mark.parametrize("alpha", [0.4, "auto"])
def test_what_cannot_be_called_is_refused_before_anything_is_run(pair, name, alpha):
    base, sft = pair
    with pytest.raises((TypeError, ValueError), match=rf"Expected `{name}` to be a function .*but got .*int"):
        rejuvenate(sft, base, calibration(base), alpha=alpha, **{name: 3})


@pytest.mark.parametrize(
    ("brought", "options", "message"),
    [
        ({}, {"alpha": 0.4, "reset": Reset()}, "calibration data for `reset` but got none"),
        ({"loss": unasked}, {"alpha": 0.4, "reset": Reset()}, "Pass as `calibration` batches for `loss`"),
        (
            {"calibration": []},
            {"alpha": "auto"},
            "a `sampler` for `alpha='auto'`, since Linear has no `generate`",
        ),
        ({"calibration": []}, {"alpha": 0.4, "refit": Refit()}, "a `sampler` for `refit`, since Linear"),
        (
            {"loss": unasked},
            {"alpha": "auto", "reset": Reset()},
            "a number for `alpha` with `loss` but got 'auto'",
        ),
        ({"loss": unasked}, {"alpha": 0.4, "refit": Refit()}, "no `refit` with `loss`"),
        (
            {"loss": unasked},
            {"alpha": 0.4, "reset": Reset(quantity="target_logit", budget="union")},
            "no `quantity`, `budget` with `loss`",
        ),
    ],
)
def test_what_is_missing_or_for_other_models_is_refused(brought, options, message):
    with pytest.raises(ValueError, match=message):
        Data(**brought).check_enough(nn.Linear(2, 2), Options(**options))


def test_what_is_enough_is_not_refused():
    for brought, options in (
        ({}, {"alpha": 0.4}),
        ({"loss": unasked}, {"alpha": 0.4}),
        ({"calibration": [], "loss": unasked}, {"alpha": 0.4, "reset": Reset(rank_by="random")}),
        ({"calibration": [], "sampler": unasked}, {"alpha": "auto", "refit": Refit()}),
    ):
        data = Data(**brought)
        data.check_enough(nn.Linear(2, 2), Options(**options))
        if options != {"alpha": 0.4}:
            data.check_effect(Options(**options))


def test_a_callers_sampler_samples_from_both_and_generate_ends_as_each_model_does():
    assert Data(sampler=unasked).samplers([], Options(), ()) == (unasked, unasked)
    base = tiny_llama()
    batches = Data(calibration(base)).batches(base, Options())
    assert len(batches) == len(calibration(base))
    ended = []
    base.generate = lambda **given: ended.append(given["generation_config"].eos_token_id) or _echo(given)
    own, of_base = Data(calibration(base)).samplers(batches, Options(), (5, 7))
    own(base)
    of_base(base)
    assert 7 not in _tokens(ended[0])
    assert {5, 7} <= _tokens(ended[-1])


def _echo(given):
    return torch.cat([given["input_ids"], given["input_ids"][:, -1:]], dim=1)


def _tokens(ends):
    return set(ends if isinstance(ends, list) else [ends])
