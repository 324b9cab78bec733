from __future__ import annotations

import pytest

from studies.analysis.forecast import Start
from studies.analysis.thresholds import bounds, halves, threshold


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_threshold_is_chosen_on_one_half_and_scored_on_the_other(sign):
    def made(seed, value):
        return Start("t", seed, str(value), {"x": sign * value}, 0.9 if value > 3 else 0.1, value > 3)

    even = [made(2, value) for value in (0, 1, 2, 4, 5)]
    odd = [made(3, value) for value in (1, 2.5, 3.1, 9)]
    assert halves(even + odd) == (even, odd)
    cut = threshold(even, odd, "x")
    assert (cut.value, cut.larger_is_better) == (sign * 3.0, sign > 0)  # half-way between 2 and 4
    assert (cut.chosen_on, cut.scored_on, cut.balanced_accuracy) == (5, 4, 1.0)
    shifted = [made(3, 4)._replace(success=False), made(3, 5), made(3, 2)._replace(success=True), made(3, 1)]
    cut = threshold(even, shifted, "x")
    assert cut.value == sign * 3.0
    assert (cut.sensitivity, cut.specificity) == (0.5, 0.5)


def test_threshold_needs_both_outcomes_and_a_measure_that_tells():
    good, bad = (Start("t", 0, "a", {"x": 1.0}, 1.0, True), Start("t", 0, "b", {"x": 1.0}, 0.0, False))
    assert threshold([good, good], [good, bad], "x") is None
    assert threshold([good, bad], [good, bad], "x") is None


def test_bounds_of_a_sharp_change():
    made = [Start("t", 0, str(v), {"x": float(v)}, 0.0, v >= 5) for v in range(10)]
    held_out = [
        Start("t", 1, str(v), {"x": float(v)}, 0.0, success)
        for v, success in ((4, True), (6, True), (1, False))
    ]
    found = bounds(made, held_out, "x")
    assert found.safe == found.lost == 4.5
    assert (found.above_safe.value, found.below_lost.value, found.between) == (1.0, 0.5, None)


def test_bounds_of_a_gradual_change():
    outcomes = [False] * 20 + [True, False] * 5 + [True] * 20
    made = [Start("t", 0, str(v), {"x": float(v)}, 0.0, success) for v, success in enumerate(outcomes)]
    found = bounds(made, made, "x")
    # From 28 on 21 of 22 succeed, from 27 on 21 of 23; up to 20 one of 21 does, up to 22 two of 23.
    assert (found.safe, found.lost) == (27.5, 21.5)
    assert (found.above_safe.n, found.between.n, found.below_lost.n) == (22, 6, 22)
