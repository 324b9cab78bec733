"""The monitor's verdict, and the alarms: each threshold from both sides."""

from __future__ import annotations

import pytest

from lightning_rejuv.metrics import PlasticityMonitor
from lightning_rejuv.metrics.alarms import rl_alarms
from tests.conftest import batch, tiny_llama
from tests.metrics.test_monitor import clone_of


def test_a_collapsed_model_of_the_monitor():
    base = tiny_llama()
    model = tiny_llama()
    model.get_output_embeddings().weight.data.mul_(30)
    monitor = PlasticityMonitor(anchor=clone_of(base), probe=[batch()], base_samples=[batch()])
    monitor.measure(model)
    assert monitor.verdict().level == "collapsed"
    assert [reason.measure for reason in monitor.verdict().reasons] == ["support_retention", "token_entropy"]
    assert PlasticityMonitor().verdict().level == "unknown"


@pytest.mark.parametrize(
    ("initial", "now", "progress", "expected"),
    [
        (0.5, 0.3, 0.1, set()),
        (0.179, 0.179, 0.0, {"low_entropy"}),
        (0.181, 0.181, 0.0, set()),
        (0.5, 0.24, 0.25, {"entropy_fall"}),
        (0.5, 0.24, 0.26, set()),
        (0.1, 0.01, 0.1, {"low_entropy", "entropy_fall"}),
    ],
)
def test_alarms(initial, now, progress, expected):
    assert set(rl_alarms(initial, now, progress)) == expected


@pytest.mark.parametrize(
    ("base", "rejuvenated", "advice"),
    [
        (0.30, False, "Rejuvenate, or take an earlier checkpoint."),
        (0.30, True, "take an earlier checkpoint, or a smaller `alpha`."),
        (0.17, False, None),  # the base lies below it as well
        (0.17, True, None),
        (None, False, "Rejuvenate, or take an earlier checkpoint."),
        (None, True, None),
    ],
)
def test_the_absolute_alarm_goes_by_the_base_and_by_what_was_done(base, rejuvenated, advice):
    alarms = rl_alarms(0.15, 0.15, 0.1, base_entropy=base, rejuvenated=rejuvenated)
    assert list(alarms) == ([] if advice is None else ["low_entropy"])
    if advice is not None:
        assert alarms["low_entropy"].endswith(advice)
        assert ("Rejuvenate" in alarms["low_entropy"]) is not rejuvenated
    falls = rl_alarms(0.15, 0.01, 0.1, base_entropy=base, rejuvenated=rejuvenated)
    assert "entropy_fall" in falls
