from __future__ import annotations

import warnings

import pytest

from lightning_rejuv.alpha import search_alpha


@pytest.mark.parametrize("target", [0.1, 1.0, 2.5])
def test_it_finds_where_a_growing_excess_reaches_the_target(target):
    search = search_alpha(lambda alpha: 3 * alpha**2, target)
    exact = (target / 3) ** 0.5
    assert exact - 0.005 <= search.alpha <= exact
    assert search.curve == sorted(search.curve)
    assert (1.0, 3.0) in search.curve


def test_a_model_that_lost_nothing_is_kept_whole():
    assert search_alpha(lambda alpha: 0.2 * alpha, 1.0).alpha == 1.0


def test_a_value_at_its_target_is_allowed():
    """The target is what the value may reach; every step of the bisection counts alike."""
    assert search_alpha(lambda alpha: alpha, 1.0).alpha == 1.0
    assert search_alpha(lambda alpha: alpha, 0.5).alpha == 0.5
    assert search_alpha(lambda alpha: float(alpha > 0.75), 0.0).alpha == 0.75


@pytest.mark.parametrize("rule", ["auto", "entropy_ratio"])
def test_an_alpha_of_zero_is_said_aloud(rule):
    """All of SFT is gone then, and a report of it looks like any other."""
    with pytest.warns(
        UserWarning, match=r"found none within its target of 0: at 0\.0039.*nothing of SFT is left"
    ):
        search = search_alpha(lambda alpha: alpha, target=0.0, rule=rule)
    assert search.alpha == 0.0
    assert len(search.curve) == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search_alpha(lambda alpha: alpha, target=0.01, rule=rule).alpha > 0
