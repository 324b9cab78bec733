"""The verdict and the alarms: each threshold from both sides, and what must never decide."""

from __future__ import annotations

import math

import pytest

from lightning_rejuv.metrics import PlasticityMonitor
from lightning_rejuv.metrics.alarms import rl_alarms
from lightning_rejuv.metrics.verdict import judge
from tests.conftest import batch, tiny_llama
from tests.metrics.test_monitor import clone_of


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (0.3, "plastic"),
        (-1.99, "plastic"),
        (-2.01, "at risk"),
        (-7.99, "at risk"),
        (-8.01, "collapsed"),
        (math.nan, "collapsed"),
    ],
)
def test_support_retention(value, level):
    assert judge({"support_retention": value}).level == level


def test_long_responses_scale_the_thresholds():
    assert judge({"support_retention": -10.0}, response_tokens=25).level == "collapsed"
    assert judge({"support_retention": -5.0}, response_tokens=75).level == "plastic"


@pytest.mark.parametrize(
    ("ratio", "level"),
    [(1.2, "plastic"), (0.51, "plastic"), (0.49, "at risk"), (0.11, "at risk"), (0.09, "collapsed")],
)
def test_entropy_is_judged_against_the_base(ratio, level):
    for base in (0.1, 2.0):
        assert judge({"token_entropy": ratio * base}, {"token_entropy": base}).level == level


def test_without_the_base_entropy_says_nothing():
    assert judge({"token_entropy": 0.001}).level == "unknown"
    assert judge({"token_entropy": 0.001}, {"token_entropy": 0.0}).level == "unknown"


@pytest.mark.parametrize(
    ("fraction", "pass_rate", "level"),
    [(0.49, 0.1, "plastic"), (0.6, 0.1, "at risk"), (0.99, 0.0, "collapsed"), (0.99, 0.97, "unknown")],
)
def test_equal_groups(fraction, pass_rate, level):
    assert judge({"zero_variance_fraction": fraction, "pass_at_1": pass_rate}).level == level


def test_the_strongest_evidence_decides():
    base = {"token_entropy": 1.0}
    low = {"token_entropy": 0.01}
    known = judge({**low, "support_retention": 0.0, "zero_variance_fraction": 1.0}, base)
    assert known.level == "plastic"  # the others are shown beside it
    assert [reason.level for reason in known.reasons] == ["plastic", "collapsed", "collapsed"]
    assert judge({"token_entropy": 1.0, "support_retention": -9.0}, base).level == "collapsed"
    assert judge({"token_entropy": 1.0, "support_retention": -5.0}, base).level == "at risk"
    assert judge({**low, "zero_variance_fraction": 0.0}, base).level == "collapsed"


def test_dormancy_drift_and_rank_are_never_judged():
    dead = {"dormant_fraction": 1.0, "dormancy_score_low": 0.0, "relative_drift": 9.0, "effective_rank": 1.0}
    assert judge(dead, {"effective_rank": 99.0}).level == "unknown"


def test_it_reads_as_a_sentence():
    text = str(judge({"support_retention": -9.0, "token_entropy": 0.2}, {"token_entropy": 0.3}))
    lines = text.splitlines()
    assert lines[0] == "collapsed"
    assert "9.00 nats a response less likely" in lines[1]
    assert lines[1].endswith("[collapsed]")
    assert "0.67 of the base's 0.300" in lines[2]


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
