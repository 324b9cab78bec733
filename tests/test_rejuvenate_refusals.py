"""What `rejuvenate` refuses, and that it then has changed nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import Refit, Reset, rejuvenate
from tests.conftest import batch, sharpened, shifted, tiny_llama
from tests.test_rejuvenate import _state, calibration


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


BAD = [
    ({"alpha": 1.2}, r"`alpha` to be a number in \[0, 1\], a mapping .* but got 1.2"),
    ({"alpha": "half"}, "`alpha`"),
    ({"reset": 0.1}, "`reset` to be a `Reset` or None but got 0.1"),
    ({"refit": 20}, "`refit` to be a `Refit` or None but got 20"),
    ({"alpha": "kl_balance"}, r"one of \('auto',\) but got 'kl_balance'"),
    ({"alpha": {"*.mlp.*": 0.5}}, "no pattern fits"),
    ({"alpha": {"*": 0.5, "*.lora.*": 0.5}}, r"no parameter fits \['\*.lora.\*'\]"),
    ({"alpha": {"*": 2.0}}, "every value of `alpha`"),
    ({"alpha": "auto", "reset": None, "calibration": None}, "calibration data for `alpha='auto'` but"),
    ({"rounding": "down"}, "`rounding`"),
    ({"optimizer_state": "forget"}, "`optimizer_state`"),
    ({"alpha": "auto", "calibration": []}, "iterable is empty"),
    ({"reset": Reset(fraction=0.1), "calibration": None}, "calibration data for `reset` but"),
    ({"reset": Reset(fraction=0.1), "calibration": []}, "iterable is empty"),
    ({"reset": Reset(fraction=0.1), "calibration": [{"input_ids": torch.ones(1, 3).long()}]}, "'labels'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_change_nothing(pair, options, message):
    base, sft = pair
    before = _state(sft)
    with pytest.raises(ValueError, match=message):
        rejuvenate(
            sft,
            base,
            **{"calibration": calibration(base), "alpha": 0.5, "reset": Reset(fraction=0.1), **options},
        )
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())


def test_a_response_without_tokens_is_named(pair):
    base, sft = pair
    empty = batch()
    empty["labels"][1] = -100
    with pytest.raises(ValueError, match=r"calibration batch 1 .* rows \[1\] have none"):
        rejuvenate(sft, base, [batch(), empty], alpha=0.5, reset=Reset(fraction=0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(pair, value):
    base, sft = pair
    broken = copy.deepcopy(sft)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"the model holds NaN or infinity in \['model.layers.1.mlp.up_proj"):
        rejuvenate(broken, base, alpha=0.5)
    with pytest.raises(ValueError, match=r"anchor \(the given module\) holds NaN or infinity"):
        rejuvenate(sft, broken, alpha=0.5)


def test_an_anchor_that_is_the_model_is_refused(pair):
    base, _ = pair
    with pytest.raises(ValueError, match="equals the model in every parameter"):
        rejuvenate(base, copy.deepcopy(base), alpha=0.5)


def test_a_family_that_the_map_does_not_know_is_refused_for_reset_only():
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    sft = shifted(base)
    with pytest.raises(ValueError, match="does not know the family None of Sequential"):
        rejuvenate(sft, base, [batch()], alpha=0.5, reset=Reset(fraction=0.1))
    before, anchor = _state(sft), _state(base)
    rejuvenate(sft, base, alpha=0.5)
    for name, parameter in sft.named_parameters():
        torch.testing.assert_close(parameter.detach(), (before[name] + anchor[name]) / 2)


def test_an_error_during_calibration_leaves_the_model_as_it_was(pair):
    base, sft = pair
    before = _state(sft)
    shorter = batch(length=7)

    def fail(_module, args):
        if args[0].shape[1] == 7:
            raise RuntimeError("out of memory")

    failing = sft.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        rejuvenate(sft, base, [batch(), shorter], alpha=0.5, reset=Reset(fraction=0.1))
    failing.remove()
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sft.modules())
    with pytest.raises(ValueError, match="to lie in the model's vocabulary of 23"):
        rejuvenate(sft, base, [batch(), batch(vocabulary=500)], alpha=0.5, reset=Reset(fraction=0.1))


@pytest.mark.parametrize("error", [OSError("input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("refit", [None, Refit(steps=1)], ids=["plain", "refit"])
def test_an_error_in_the_middle_of_the_edit_says_what_was_changed(pair, error, refit):
    from lightning_rejuv import RejuvenationError
    from lightning_rejuv.anchor import Anchor

    base, sft = pair

    class Failing(Anchor):
        """Reads every tensor once, for the checks, and the third one not again."""

        inner = Anchor.open(base)
        reads = 0

        @property
        def description(self):
            return "a failing disk"

        def names(self):
            return self.inner.names()

        def shape(self, name):
            return self.inner.shape(name)

        def tensor(self, name):
            self.reads += 1
            if self.reads == len(self.names()) + 3:
                raise error
            return self.inner.tensor(name)

    data = None if refit is None else calibration(base)
    before = _state(sft)
    with pytest.raises((type(error), RejuvenationError)) as raised:
        rejuvenate(sft, Failing(), data, alpha=0.5, refit=refit)
    if refit is not None:  # the edit is tried there first, and put back
        assert raised.value is error
        assert all(torch.equal(value, before[name]) for name, value in sft.state_dict().items())
        return
    assert type(raised.value) is (
        KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RejuvenationError
    )
    what = "OSError: input/output error" if isinstance(error, OSError) else "KeyboardInterrupt"
    assert f"The edit stopped with {what}. Edited by then: 2 of 21 parameters" in str(raised.value)


def test_quantised_weights_are_refused(pair):
    base, sft = pair
    layer = sft.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight \(torch.int8\)'\] are not. Quantised"):
        rejuvenate(sft, base, alpha=0.5)


def test_a_patched_model_whose_contributions_do_not_add_up_is_refused(pair):
    base, sft = pair
    for model in (base, sft):
        model.model.layers[1].register_forward_hook(lambda _m, _a, out: out + 1.0)
    before = _state(sft)
    with pytest.raises(ValueError, match="add up to the target logits but the reconstruction error is"):
        rejuvenate(
            sft, base, calibration(base), alpha=0.5, reset=Reset(fraction=0.1, quantity="target_logit")
        )
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())
