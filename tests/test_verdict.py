"""The verdict: every threshold at it and on both sides of it, every order of rules, every sentence."""

from __future__ import annotations

import itertools
import math
import sys

import pytest

from lightning_rejuv import verdict
from lightning_rejuv.verdict import Reason, Verdict, judge

BELOW, ABOVE = -math.inf, math.inf
RETENTION = "support_retention"
GROUPS = "zero_variance_fraction"


def just(value: float, toward: float) -> float:
    """The next float64: no threshold can move, and no comparison turn, without a neighbour noticing."""
    return math.nextafter(value, toward)


def test_the_thresholds_are_the_documented_ones():
    assert (verdict.RETENTION_AT_RISK, verdict.RETENTION_COLLAPSED, verdict.RETENTION_TOKENS) == (-2, -8, 25)
    assert (verdict.ENTROPY_AT_RISK, verdict.ENTROPY_COLLAPSED) == (0.5, 0.1)
    assert (verdict.ZERO_VARIANCE_AT_RISK, verdict.ZERO_VARIANCE_COLLAPSED) == (0.5, 0.95)


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (ABOVE, "plastic"),
        (0.3, "plastic"),
        (0.0, "plastic"),
        (just(-2.0, ABOVE), "plastic"),
        (-2.0, "plastic"),
        (just(-2.0, BELOW), "at risk"),
        (just(-8.0, ABOVE), "at risk"),
        (-8.0, "at risk"),
        (just(-8.0, BELOW), "collapsed"),
        (BELOW, "collapsed"),
        (math.nan, "collapsed"),
    ],
)
def test_support_retention(value, level):
    found = judge({RETENTION: value})
    assert (found.level, [reason.level for reason in found.reasons]) == (level, [level])


@pytest.mark.parametrize(
    ("tokens", "scale"),
    [
        (None, 1.0),
        (0.0, 1.0),
        (1.0, 1.0),
        (24.0, 1.0),
        (25.0, 1.0),
        (26.0, 1.04),
        (50.0, 2.0),
        (75.0, 3.0),
        (1000.0, 40.0),
        (math.nan, 1.0),
    ],
)
def test_thresholds_of_retention_grow_with_long_responses_and_never_shrink(tokens, scale):
    for threshold, better, worse in ((-2.0, "plastic", "at risk"), (-8.0, "at risk", "collapsed")):
        assert judge({RETENTION: threshold * scale * (1 - 1e-9)}, response_tokens=tokens).level == better
        assert judge({RETENTION: threshold * scale * (1 + 1e-9)}, response_tokens=tokens).level == worse
        assert (
            f"below {threshold * scale:g}" in judge({RETENTION: 0.0}, response_tokens=tokens).reasons[0].text
        )


@pytest.mark.parametrize(
    ("ratio", "level"),
    [
        (1.2, "plastic"),
        (just(0.5, ABOVE), "plastic"),
        (0.5, "plastic"),
        (just(0.5, BELOW), "at risk"),
        (just(0.1, ABOVE), "at risk"),
        (0.1, "at risk"),
        (just(0.1, BELOW), "collapsed"),
        (0.0, "collapsed"),
        (math.nan, "collapsed"),
    ],
)
def test_entropy_is_judged_against_the_base(ratio, level):
    for base in (0.125, 1.0, 2.0):  # powers of two: the ratio is exact
        assert judge({"token_entropy": ratio * base}, {"token_entropy": base}).level == level


@pytest.mark.parametrize(
    "base", [None, {}, {"top1_confidence": 1.0}, *({"token_entropy": e} for e in (0.0, -1.0, math.nan))]
)
def test_without_the_bases_entropy_the_entropy_says_nothing(base):
    assert judge({"token_entropy": 0.001}, base) == Verdict("unknown", ())


def test_the_smallest_entropy_of_a_base_is_enough():
    assert judge({"token_entropy": 0.0}, {"token_entropy": sys.float_info.min}).level == "collapsed"


@pytest.mark.parametrize(
    ("fraction", "level"),
    [
        (0.0, "plastic"),
        (just(0.5, BELOW), "plastic"),
        (0.5, "plastic"),
        (just(0.5, ABOVE), "at risk"),
        (just(0.95, BELOW), "at risk"),
        (0.95, "at risk"),
        (just(0.95, ABOVE), "collapsed"),
        (1.0, "collapsed"),
    ],
)
@pytest.mark.parametrize("passed", [{}, {"pass_at_1": 0.0}, {"pass_at_1": 0.5}])
def test_equal_groups(fraction, level, passed):
    assert judge({GROUPS: fraction, **passed}).level == level


@pytest.mark.parametrize("rate", [just(0.5, ABOVE), 1.0])
def test_equal_groups_say_nothing_where_most_rollouts_succeed(rate):
    assert judge({GROUPS: 1.0, "pass_at_1": rate}) == Verdict("unknown", ())
    assert judge({"pass_at_1": 0.0}) == Verdict("unknown", ())


# What gives each measure each level; the base has 1 nat.
VALUES = {
    RETENTION: {"plastic": 0.0, "at risk": -5.0, "collapsed": -9.0},
    "token_entropy": {"plastic": 1.0, "at risk": 0.3, "collapsed": 0.01},
    GROUPS: {"plastic": 0.0, "at risk": 0.7, "collapsed": 1.0},
}
ORDER = ["plastic", "at risk", "collapsed"]
ALL = list(itertools.product([None, *ORDER], repeat=3))


@pytest.mark.parametrize("levels", ALL)
def test_every_combination(levels):
    """Support decides alone where it was measured; without it the worst decides; all are listed, in order."""
    given = {name: level for name, level in zip(VALUES, levels, strict=True) if level is not None}
    found = judge(
        {name: VALUES[name][level] for name, level in reversed(given.items())}, {"token_entropy": 1.0}
    )
    assert [(reason.measure, reason.level) for reason in found.reasons] == list(given.items())
    if RETENTION in given:
        assert found.level == given[RETENTION]
    elif given:
        assert found.level == max(given.values(), key=ORDER.index)
    else:
        assert found.level == "unknown"


def test_dormancy_drift_and_rank_are_never_judged():
    dead = {"dormant_fraction": 1.0, "dormancy_score_low": 0.0, "relative_drift": 9.0, "effective_rank": 1.0}
    assert judge(dead, {"effective_rank": 99.0}) == Verdict("unknown", ())


def test_it_reads_as_sentences():
    values = {RETENTION: -9.0, "token_entropy": 0.2, GROUPS: 0.7}
    assert str(judge(values, {"token_entropy": 0.3})).splitlines() == [
        "collapsed",
        "- the base's own responses are 9.00 nats a response less likely than under the base (at risk below -2, "
        "collapsed below -8) [collapsed]",
        "- token entropy 0.200 nats is 0.67 of the base's 0.300 (at risk below 0.5, collapsed below 0.1) [plastic]",
        "- 70% of the rollout groups carry no learning signal (at risk above 50%, collapsed above 95%) [at risk]",
    ]
    assert "1.00 nats a response more likely" in judge({RETENTION: 1.0}).reasons[0].text
    assert "0.00 nats a response more likely" in judge({RETENTION: 0.0}).reasons[0].text
    assert str(judge({})) == "unknown"
    assert str(Verdict("plastic", (Reason("a", "plastic", "b"),))) == "plastic\n- b [plastic]"
