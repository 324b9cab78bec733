from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from studies.analysis.resampling import interquartile_mean, probability_of_improvement
from studies.analysis.statistics import mcnemar_p

DRAWS = np.random.default_rng(7)
TASKS = [DRAWS.uniform(size=8), DRAWS.uniform(size=12), DRAWS.normal(0.5, 0.4, size=20)]


def _middle(values):
    """The interquartile mean of a multiple of four values."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return sum(ordered[quarter : len(ordered) - quarter]) / (len(ordered) - 2 * quarter)


def _quantiles(values):
    return np.quantile(np.repeat(values, 1000), [0.025, 0.975])  # nothing is interpolated


def test_interquartile_mean_is_that_of_all_runs_together():
    found = interquartile_mean(TASKS)
    assert found.n == 40
    assert found.value == pytest.approx(_middle(np.concatenate(TASKS)))
    assert found.low < found.value < found.high


def test_interval_of_the_interquartile_mean_is_the_bootstrap_within_tasks():
    """All 3^3 x 2^2 samples are equally likely here: their quantiles are the exact interval."""
    tasks = [[0.0, 0.5, 0.6], [2.0, 3.0]]
    every = [
        np.mean(sorted([*one, *other])[1:-1])  # five values: one is left out at either end
        for one in product(tasks[0], repeat=3)
        for other in product(tasks[1], repeat=2)
    ]
    found = interquartile_mean(tasks, draws=40_000)
    assert (found.low, found.high) == pytest.approx(_quantiles(every), abs=1e-9)
    assert found.low > min(np.concatenate(tasks))  # runs drawn from all tasks together would come down to 0


def test_interquartile_mean_of_few_runs():
    assert interquartile_mean([[], [0.4]]) == (1, 0.4, None, None)
    with pytest.raises(ValueError, match="got none"):
        interquartile_mean([[], []])


def test_probability_of_improvement_counts_all_pairs_and_halves_ties():
    ours, theirs = [[0.1, 0.5, 0.9], [0.3]], [[0.5, 0.2], [0.4, 0.1, 0.3]]
    shares = [
        np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in product(our, their)])
        for our, their in zip(ours, theirs, strict=True)
    ]
    found = probability_of_improvement(ours, theirs)
    assert found.value == pytest.approx(np.mean(shares))  # a task weighs as much as another
    assert found.n == 4
    back = probability_of_improvement(theirs, ours)
    assert back.value == pytest.approx(1 - found.value)
    assert probability_of_improvement([[], [0.3]], [[0.2], []]) is None


def test_interval_of_the_probability_of_improvement_is_the_bootstrap_of_both_sides():
    ours, theirs = [0.2, 0.6, 0.7], [0.1, 0.5]
    every = [
        np.mean([x > y for x, y in product(our, their)])
        for our in product(ours, repeat=3)
        for their in product(theirs, repeat=2)
    ]
    found = probability_of_improvement([ours], [theirs], draws=40_000)
    assert (found.low, found.high) == pytest.approx(_quantiles(every), abs=1e-9)


def test_a_task_without_both_does_not_count():
    assert probability_of_improvement([[0.9], []], [[0.1], [0.5]]) == (1, 1.0, None, None)


@pytest.mark.parametrize(("won", "lost", "both"), [(0, 0, 3), (5, 0, 2), (1, 6, 0), (4, 4, 1), (9, 2, 9)])
def test_mcnemar_is_the_sign_test_of_the_discordant(won, lost, both):
    ours = {n: n < won + both for n in range(won + lost + both)}
    theirs = {n: n >= won for n in ours}
    tail = binom.cdf(min(won, lost), won + lost, 0.5)
    assert mcnemar_p({**ours, 99: True}, theirs) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_p(theirs, ours) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_p(ours, {}) is None
