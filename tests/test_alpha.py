from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lightning_rejuv.alpha import GRID, AlphaPoint, bargain, doubt_samples, with_rollouts


def line(demonstrations, base_samples, form=lambda alpha: 1.0, grid=GRID):
    return [AlphaPoint(a, demonstrations(a), base_samples(a), form(a)) for a in grid]


def demonstrations(alpha):
    """Steep near the base, and rising again where SFT was overdone: as in docs/results/real."""
    return 5 + 27 * (1 - alpha) ** 4 + 6 * alpha**3


def base_samples(alpha):
    return 180 + 10 * alpha + 50 * alpha**2


@pytest.mark.parametrize(
    ("taught", "known"),
    [
        (demonstrations, base_samples),
        (lambda a: 8 * (1 - a) ** 2, lambda a: 3 + 9 * a**3),
        (lambda a: 8 - 7 * a, lambda a: 2 + 2 * a),
        (lambda a: 30 * math.exp(-6 * a), lambda a: 20 * a**2),
    ],
)
def test_the_product_of_both_gains_is_largest_there(taught, known):
    found = bargain(line(taught, known))
    exact = minimize_scalar(
        lambda a: -(taught(0) - taught(a)) * (known(1) - known(a)), bounds=(0, 1), method="bounded"
    ).x
    assert found.alpha == pytest.approx(exact, abs=0.015)


@pytest.mark.parametrize("factors", [(0.01, 0.1), (0.01, 300), (40, 0.1), (40, 300)])
def test_neither_units_nor_lengths_nor_counts_change_it(factors):
    """A factor on either likelihood is another unit, other lengths or other counts; a summand is a harder text."""
    usual = bargain(line(demonstrations, base_samples)).alpha
    other = line(lambda a: factors[0] * demonstrations(a) + 3, lambda a: factors[1] * base_samples(a) + 100)
    assert bargain(other).alpha == pytest.approx(usual, abs=1e-9)


def test_the_shares_are_of_the_most_that_the_line_has():
    found = bargain(line(demonstrations, base_samples))
    lowest = min(map(demonstrations, GRID))
    taught = (demonstrations(0) - demonstrations(found.alpha)) / (demonstrations(0) - lowest)
    kept = (base_samples(1) - base_samples(found.alpha)) / (base_samples(1) - base_samples(0))
    assert (found.taught, found.kept) == (pytest.approx(taught, abs=0.02), pytest.approx(kept, abs=0.02))
    assert found.doubts == ()


def test_models_that_do_not_differ_are_left_alone():
    found = bargain(line(lambda a: 3.0, lambda a: 5.0))
    assert (found.alpha, found.taught, found.kept, found.doubts) == (1.0, 1.0, 1.0, ())


def test_a_base_that_lost_nothing_leaves_the_likeliest_demonstrations():
    assert bargain(line(lambda a: 10 * (1 - a), lambda a: 5 - a)).alpha == 1.0
    assert bargain(line(lambda a: 10 * (a - 0.7) ** 2, lambda a: 5.0)).alpha == pytest.approx(0.7)


def test_demonstrations_that_sft_made_no_likelier_are_refused():
    with pytest.raises(
        ValueError, match=r"likeliest under the base \(5.00 nats a response, 8.00 under the SFT"
    ):
        bargain(line(lambda a: 5 + 3 * a, base_samples))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_refused(bad, which):
    curves = [demonstrations, base_samples]
    broken = curves[which]
    curves[which] = lambda a: bad if a == 1 else broken(a)
    with pytest.raises(ValueError, match="Expected finite likelihoods on the line .* at alpha 1 the"):
        bargain(line(*curves))


def test_it_says_if_no_alpha_keeps_both():
    (doubt,) = bargain(line(lambda a: 20 - 20 * a**6, lambda a: 5 + 9 * (1 - (1 - a) ** 3))).doubts
    assert doubt.startswith("No alpha keeps both: at 0.6")


def test_it_says_if_the_curve_has_two_peaks():
    bumps = dict(zip(GRID, [0, 0.2, 0.5, 0.3, 0.3, 0.5, 1.0, 1.0, 1.0, 1.0], strict=True))
    found = bargain(line(lambda a: 10 - 10 * bumps[a], lambda a: 5 + 0.5 * a))
    assert any("more than one peak" in doubt for doubt in found.doubts)


def test_it_says_if_the_format_is_lost_there():
    (doubt,) = bargain(line(demonstrations, base_samples, lambda a: a**4)).doubts
    assert "probability of only 0.0" in doubt
    assert bargain(line(demonstrations, base_samples, lambda a: a)).doubts == ()


def test_it_says_if_samples_are_cut_off():
    assert doubt_samples(24, 2) == ()
    assert doubt_samples(24, 10) == (
        "10 of the base's 24 samples did not end: their beginnings were judged.",
    )


def test_rollouts_that_are_right_leave_alpha_as_it_is():
    search = bargain(line(demonstrations, base_samples))
    asked = []
    found = with_rollouts(search, lambda alpha: asked.append(alpha) or 0.25, 32)
    assert (found.alpha, found.right, found.doubts, asked) == (search.alpha, 0.25, (), [search.alpha])


def test_alpha_is_raised_until_a_rollout_is_right():
    search = bargain(line(demonstrations, base_samples))
    found = with_rollouts(search, lambda alpha: float(alpha > search.alpha + 0.15), 32)
    assert found.alpha == pytest.approx(search.alpha + 0.2)
    assert found.right == 1.0
    assert found.taught > search.taught
    assert found.kept < search.kept
    assert found.doubts[0].startswith("None of 32 rollouts is right at alpha 0.")


def test_a_few_rollouts_raise_nothing():
    search = bargain(line(demonstrations, base_samples))
    asked = []
    found = with_rollouts(search, lambda alpha: asked.append(alpha) or 0.0, 31)
    assert (found.alpha, found.right, asked) == (search.alpha, 0.0, [search.alpha])
    assert "which are too few to tell" in found.doubts[0]


def test_alpha_is_not_raised_for_nothing():
    search = bargain(line(demonstrations, base_samples))
    asked = []
    found = with_rollouts(search, lambda alpha: asked.append(alpha) or 0.0, 32)
    assert (found.alpha, found.right) == (search.alpha, 0.0)
    np.testing.assert_allclose(asked, search.alpha + np.array([0, 0.1, 0.2, 0.3]))
    assert "RL will have nothing to reward" in found.doubts[0]
