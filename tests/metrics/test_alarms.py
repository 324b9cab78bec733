"""The two alarms of the RL stage: each threshold from both sides."""

from __future__ import annotations

import pytest

from lightning_rejuv.metrics.alarms import rl_alarms


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
