from __future__ import annotations

import doctest
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from studies.analysis import markdown, statistics
from studies.analysis.statistics import (
    Estimate,
    holm,
    mean,
    paired,
    sign_flip_p,
    spearman,
    success_rate,
)


@pytest.mark.parametrize("module", [statistics, markdown])
def test_doctests(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


def test_mean_is_the_t_interval_of_scipy():
    values = np.random.default_rng(0).normal(0.7, 0.2, 20)
    found = mean(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.n == 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_mean_of_one_value_has_no_interval_and_of_equal_ones_no_width():
    assert mean([0.4]) == Estimate(1, 0.4, None, None)
    assert mean([0.5, 0.5, 0.5]) == Estimate(3, 0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        mean([])


def test_paired_uses_common_seeds_only():
    ours = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.2}
    theirs = {2: 0.5, 3: 0.7, 4: 0.4, 5: 0.0}
    found = paired(ours, theirs, test=True)
    differences = np.array([0.3, 0.0, -0.2])
    expected = stats.ttest_rel([0.8, 0.7, 0.2], [0.5, 0.7, 0.4]).confidence_interval(0.95)
    assert found.estimate.n == 3
    assert found.estimate.value == pytest.approx(differences.mean())
    assert (found.estimate.low, found.estimate.high) == pytest.approx((expected.low, expected.high))
    assert (found.wins, found.losses) == (1, 1)
    assert found.p is not None
    assert paired(ours, theirs).p is None
    assert paired(ours, {9: 1.0}) is None


def test_sign_flip_is_the_full_enumeration():
    data = np.array([0.31, 0.12, -0.05, 0.44, 0.08, 0.27, -0.11, 0.36])
    means = [abs((data * signs).mean()) for signs in product([1, -1], repeat=len(data))]
    expected = np.mean([value >= abs(data.mean()) - 1e-12 for value in means])
    assert sign_flip_p(data) == pytest.approx(expected)
    assert sign_flip_p(-data) == pytest.approx(expected)
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0


def test_sign_flip_of_many_pairs_is_close_to_the_t_test_and_the_same_every_time():
    data = np.random.default_rng(1).normal(0.05, 0.1, 20)
    assert sign_flip_p(data) == pytest.approx(stats.ttest_1samp(data, 0).pvalue, abs=0.02)
    assert sign_flip_p(data) == sign_flip_p(data)
    assert sign_flip_p(np.full(20, 0.6)) < 1e-3


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (17, 20), (20, 20), (1, 3)])
def test_success_rate_is_wilson(successes, n):
    z, p = stats.norm.ppf(0.975), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = success_rate(successes, n)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_holm_is_closed_testing_with_bonferroni():
    """Adjusted p of a hypothesis: the largest Bonferroni p of all the subsets that it belongs to."""
    p_values = dict(zip("abcde", [0.004, 0.011, 0.02, 0.02, 0.6], strict=True))
    subsets = [set(names) for size in range(1, 6) for names in combinations(p_values, size)]
    adjusted = holm(p_values)
    for name in p_values:
        largest = max(
            min(1.0, len(names) * min(p_values[member] for member in names))
            for names in subsets
            if name in names
        )
        assert adjusted[name] == pytest.approx(largest)


def test_spearman():
    x, y = [1.0, 2.0, 3.0, 4.0], [0.1, 0.4, 0.3, 0.9]
    assert spearman(x, y) == pytest.approx(0.8)
    assert spearman(x, [0.5] * 4) is None
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None
