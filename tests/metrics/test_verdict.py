"""The monitor's verdict, and the alarms: each threshold from both sides."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.metrics import PlasticityMonitor
from lightning_rejuv.metrics.alarms import rl_alarms
from tests.conftest import batch, tiny_llama
from tests.metrics.test_monitor import clone_of


def test_an_over_confident_model_of_the_monitor():
    base = tiny_llama()
    model = tiny_llama()
    model.get_output_embeddings().weight.data.mul_(60)
    monitor = PlasticityMonitor(anchor=clone_of(base), probe=[batch()], base_samples=[batch()])
    monitor.measure(model)
    assert monitor.verdict().level == "over-confident"
    reasons = monitor.verdict().reasons
    assert [reason.measure for reason in reasons] == ["token_entropy", "token_nll"]
    assert {reason.level for reason in reasons} == {
        "over-confident"
    }  # sure, and of what the probe does not say
    assert PlasticityMonitor().verdict().level == "unknown"


@pytest.mark.parametrize(
    ("rewards", "level"),
    [
        ([[1.0] * 8, [0.0] * 8] * 4, "over-confident"),
        ([[1.0, 0.0] * 4, [0.0, 0.0, 1.0, 0.0] * 2] * 4, "healthy"),
        ([[0.0] * 8] * 8, "cannot start"),
    ],
)
def test_rollouts_come_before_the_entropy_of_the_monitor(rewards, level):
    base = tiny_llama()
    monitor = PlasticityMonitor(anchor=clone_of(base), probe=[batch()])
    monitor.measure(base)
    assert (
        monitor.verdict().level == "unknown"
    )  # its entropy is the base's, which says nothing of its rollouts
    monitor.update(torch.tensor(rewards))
    found = monitor.verdict()
    assert (found.level, found.reasons[0].measure) == (level, "pass_at_8")


@pytest.mark.parametrize(
    ("initial", "now", "progress", "expected"),
    [
        (0.5, 0.3, 0.1, set()),
        (0.049, 0.049, 0.0, {"low_entropy"}),
        (0.051, 0.051, 0.0, set()),
        (0.5, 0.24, 0.25, {"entropy_fall"}),
        (0.5, 0.24, 0.26, set()),
        (0.7, 0.34, 0.1, set()),  # a third of the base's is left
        (0.04, 0.01, 0.1, {"low_entropy", "entropy_fall"}),
    ],
)
def test_alarms_beside_a_base_of_one_nat(initial, now, progress, expected):
    assert set(rl_alarms(initial, now, progress, base_entropy=1.0)) == expected
    assert set(rl_alarms(initial / 7, now / 7, progress, base_entropy=1 / 7)) == expected


def test_without_the_base_only_a_fall_is_an_alarm():
    assert rl_alarms(0.01, 0.01, 0.0) == {}
    assert set(rl_alarms(0.7, 0.34, 0.1)) == {"entropy_fall"}


@pytest.mark.parametrize(
    ("rejuvenated", "advice"),
    [
        (False, "Rejuvenate, or take an earlier checkpoint."),
        (True, "take an earlier checkpoint, or a smaller `alpha`."),
    ],
)
def test_what_an_alarm_advises_goes_by_what_was_done(rejuvenated, advice):
    alarms = rl_alarms(0.01, 0.01, 0.1, base_entropy=0.3, rejuvenated=rejuvenated)
    assert list(alarms) == ["low_entropy"]
    assert alarms["low_entropy"].endswith(advice)
    assert "0.010 nats, less than 0.05 of the base's 0.300" in alarms["low_entropy"]
