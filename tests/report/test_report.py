"""The report is never lost once weights have changed, and is plain JSON whatever was passed."""

from __future__ import annotations

import copy
import json
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.anchor import Anchor
from lightning_rejuv.attribution.positions import select_positions
from lightning_rejuv.calibration.batches import as_batches
from tests.conftest import batch, sharpened, shifted, tiny_llama
from tests.test_rejuvenate import _state, calibration


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


KINDS = [int, Fraction, Decimal, np.float32, np.int64, np.array, torch.tensor]


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form", [lambda number: number, lambda number: {"*": number}], ids=["one", "mapping"]
)
def test_numbers_of_any_kind_do_as_floats_do(pair, tmp_path, kind, form, share):
    base, sft = pair
    found, states = [], []
    for number in (kind, float):
        model = copy.deepcopy(sft)
        options = {"reset": Reset(fraction=number(1), omega=number(1)), "alpha": form(number(share))}
        report = rejuvenate(model, base, calibration(base), **options)
        states.append(_state(model))
        report.save(tmp_path / "report.json")
        plain = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
        assert plain == report.to_dict()
        plain.update(seconds=None, peak_memory=None)
        found.append((plain, report.summary(), str(report).partition("  cost")[0]))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert found[0] == found[1]


def test_a_base_of_zeros_is_no_infinity_in_the_file(tmp_path):
    base = nn.Linear(2, 2)
    nn.init.zeros_(base.bias)
    report = rejuvenate(shifted(base), base, alpha=0.5)
    assert {t.name: t.drift_before for t in report.tensors}["bias"] == float("inf")
    report.save(tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert {t["name"]: t["drift_before"] for t in plain["tensors"]}["bias"] is None


def test_saving_follows_no_link(pair, tmp_path):
    base, sft = pair
    report = rejuvenate(sft, base, alpha=0.5)
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "report.json.part").symlink_to(tmp_path / "precious")
    report.save(tmp_path / "report.json")
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "report.json").is_symlink()


def _fail(*_args, **_options):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("target", "warning"),
    [
        ("mean_entropy", "its entropy could not be measured afterwards: RuntimeError: out of memory"),
        ("edit_optimizer_state", "the optimizer's state could not be edited afterwards"),
    ],
)
def test_what_fails_after_the_edit_does_not_lose_the_report(pair, monkeypatch, target, warning):
    base, sft = pair
    expected = copy.deepcopy(sft)
    options = {"alpha": 0.5, "reset": Reset(fraction=0.1)}
    whole = rejuvenate(expected, base, calibration(base), **options)
    monkeypatch.setattr(sys.modules["lightning_rejuv.rejuvenate"], target, _fail)
    with pytest.warns(UserWarning, match=f"The model was rejuvenated, but {warning}"):
        report = rejuvenate(sft, base, calibration(base), **options)
    assert all(torch.equal(p, q) for p, q in zip(sft.parameters(), expected.parameters(), strict=True))
    assert report.neurons == whole.neurons
    assert report.drift_after == whole.drift_after
    if target == "mean_entropy":
        assert report.comparison.entropy_after is None
        assert "-> not measured nats" in report.summary()
        assert "-> not measured nats" in str(report)
    else:
        assert set(report.optimizer_state_left) == {name for name, _ in sft.named_parameters()}
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_anchor_that_goes_away_after_the_edit_does_not_lose_the_report(pair):
    base, sft = pair

    class Vanishing(Anchor):
        """Can be read for the checks and for the edit, and no more."""

        inner = Anchor.open(base)
        description = "a disk that is taken away"
        reads = 0

        def names(self):
            return self.inner.names()

        def shape(self, name):
            return self.inner.shape(name)

        def tensor(self, name):
            self.reads += 1
            if self.reads > 2 * len(self.names()):
                raise OSError("input/output error")
            return self.inner.tensor(name)

    with pytest.warns(UserWarning, match="its drift could not be measured afterwards: OSError"):
        report = rejuvenate(sft, Vanishing(), alpha=0.0)
    assert all(torch.equal(p, q) for p, q in zip(sft.parameters(), base.parameters(), strict=True))
    assert report.drift_after is None
    assert "-> not measured" in report.summary()
    assert "-> not measured" in str(report)


@pytest.mark.parametrize("wrong", ["adam", [nn.Linear(1, 1)], [None], 3])
def test_what_is_no_optimizer_is_refused_before_the_edit(pair, wrong):
    base, sft = pair
    before = _state(sft)
    with pytest.raises((ValueError, TypeError), match="optimizer"):
        rejuvenate(sft, base, alpha=0.5, optimizer=wrong)
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())


@pytest.mark.parametrize("rule", ["sharpened", "entropy_gap"])
@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_number_of_positions_is_that_of_the_rule(pair, rule, quantity, count):
    from lightning_rejuv.attribution import confidence

    base, sft = pair
    data = [*calibration(base), batch(seed=4)]
    expected = sharpened_count = learned = 0
    for checked in as_batches(data):
        with torch.no_grad():
            chosen = select_positions(
                confidence(sft, checked), confidence(base, checked), checked.response, rule, count
            )
        pairs = set(zip(chosen.row.tolist(), chosen.time.tolist(), strict=True))
        assert len(pairs) == len(chosen)
        assert all(checked.response[row, time] for row, time in pairs)
        expected += len(pairs)
        sharpened_count += chosen.sharpened
        learned += chosen.learned
    reset = Reset(0.1, positions=rule, positions_per_response=count, quantity=quantity)
    report = rejuvenate(sft, base, data, alpha=1.0, reset=reset)
    assert report.attribution.positions == expected
    assert (report.comparison.sharpened, report.comparison.learned) == (sharpened_count, learned)
    assert f"positions        {expected} ({rule})" in str(report)
    assert report.to_dict()["attribution"]["positions"] == expected
    if rule == "sharpened":
        assert report.comparison.sharpened == expected


@pytest.mark.parametrize("scope", ["model", "layer", "module"])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.4])
def test_the_share_that_was_asked_for_is_reset_in_every_scope(pair, scope, fraction):
    base, sft = pair
    reset = Reset(fraction, rank_by="absolute", scope=scope)
    report = rejuvenate(sft, base, calibration(base), alpha=1.0, reset=reset)
    assert report.neurons_reset == report.neurons_asked == round(fraction * report.neurons_total)
    assert "asked for" not in str(report)
    assert "asked for" not in report.summary()


def test_a_neuron_whose_reset_lowers_the_entropy_is_never_chosen_and_the_report_says_so(pair):
    """Against the entropy itself: each neuron's score is checked by a small step toward the base."""
    from lightning_rejuv.attribution import attribute_entropy, compare
    from lightning_rejuv.neurons import find_decoder
    from lightning_rejuv.weights.blend import Blend

    base, sft = pair
    data = calibration(base)
    anchor = dict(base.named_parameters())
    batches = as_batches(data)
    blend = Blend(dict(sft.named_parameters()), lambda name: anchor[name].detach())
    chosen = compare(sft, blend, batches, "sharpened", 1, base).positions
    groups = find_decoder(sft).groups
    scores = attribute_entropy(sft, groups, batches, chosen, lambda n: anchor[n].detach()).total
    positive = sum(int((score > 0).sum()) for score in scores)
    report = rejuvenate(sft, base, data, alpha=1.0, reset=Reset(fraction=0.9))
    assert report.neurons_asked == round(0.9 * report.neurons_total)
    assert report.neurons_reset == positive < report.neurons_asked
    assert [group.reset for group in report.neurons] == [int((score > 0).sum()) for score in scores]
    for group, score in zip(groups, scores, strict=True):
        weight, there = sft.get_parameter(group.parameter), anchor[group.parameter]
        returned = (weight == there).all(1 - group.dim)
        assert torch.equal(group.own(returned), score > 0)
    assert f"{report.neurons_asked} (90.00%); the score of the others is not positive: their reset" in str(
        report
    )
    assert f"({report.neurons_asked} asked for)" in report.summary()
    assert report.to_dict()["neurons_asked"] == report.neurons_asked


def test_less_than_half_a_neuron_is_none_and_said_so(pair):
    base, sft = pair
    report = rejuvenate(sft, base, calibration(base), alpha=0.5, reset=Reset(fraction=0.002))
    assert report.neurons_reset == report.neurons_asked == 0
    assert "0 (0.20%), which is less than half a neuron" in str(report)


def test_contributions_that_are_not_finite_are_refused_before_the_edit(pair):
    base, sft = pair
    before = _state(sft)
    # Nothing is added, and the gradient is infinite times zero.
    layer = sft.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda _m, _a, out: out + (out * 0).abs().sqrt())
    with pytest.raises(
        ValueError, match=r"finite contributions of the neurons but those of \['model.layers.0"
    ):
        rejuvenate(sft, base, calibration(base), alpha=1.0, reset=Reset(fraction=0.1))
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())


def test_a_report_that_cannot_be_saved_leaves_nothing(pair, tmp_path):
    base, sft = pair
    report = rejuvenate(sft, base, alpha=0.5)
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match="report.json"):
        report.save(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_papers_union_asks_for_no_number_of_neurons(pair):
    base, sft = pair
    reset = Reset(0.1, quantity="target_logit", budget="union", positions_per_response=4)
    report = rejuvenate(sft, base, calibration(base), alpha=1.0, reset=reset)
    assert report.neurons_reset > round(0.1 * report.neurons_total)
    assert report.neurons_asked is None
    assert report.to_dict()["neurons_asked"] is None
    assert "asked for" not in report.summary()


def test_without_a_fusion_no_buffer_is_said_to_be_left():
    """At alpha = 1 nothing would have been done to it, had the anchor held it."""
    base = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    parameters = {name: p.detach() for name, p in base.named_parameters()}
    kept = [rejuvenate(shifted(base), parameters, alpha=alpha).buffers_kept for alpha in (0.5, 1.0)]
    assert kept == [["1.running_mean", "1.running_var"], []]
