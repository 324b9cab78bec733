from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lightning_rejuv.alpha.search import (
    FIRST,
    GRID,
    USUAL_ALPHA,
    AlphaPoint,
    NoAlpha,
    choose_alpha,
    is_clear,
    with_rollouts,
)


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
    found = choose_alpha(line(taught, known))
    exact = minimize_scalar(
        lambda a: -(taught(0) - taught(a)) * (known(1) - known(a)), bounds=(0, 1), method="bounded"
    ).x
    assert found.bargain == pytest.approx(exact, abs=0.015)


def product(alpha, taught, known):
    """Of the shares that are kept of what the line has at most, on its grid."""
    gained = (taught(0) - np.interp(alpha, GRID, [*map(taught, GRID)])) / (taught(0) - min(map(taught, GRID)))
    kept = (known(1) - np.interp(alpha, GRID, [*map(known, GRID)])) / (known(1) - min(map(known, GRID)))
    return gained * kept


def test_the_usual_alpha_is_taken_where_it_is_a_good_bargain():
    assert choose_alpha(line(demonstrations, base_samples)).alpha == USUAL_ALPHA == 0.4


@pytest.mark.parametrize(
    ("taught", "known", "larger"),
    [
        (lambda a: 9 * (1 - a**5), base_samples, True),  # what SFT taught is lost at once
        (lambda a: 9 * (1 - a) ** 8, lambda a: 2 + 9 * (1 - (1 - a) ** 6), False),  # the base's support is
    ],
)
def test_on_an_unusual_line_it_is_the_nearest_good_bargain(taught, known, larger):
    found = choose_alpha(line(taught, known))
    assert (found.alpha > USUAL_ALPHA) == larger
    fine = np.linspace(0, 1, 2001)
    products = product(fine, taught, known)
    good = fine[products >= 0.75 * product(np.array(GRID), taught, known).max()]
    assert found.alpha == pytest.approx(good[np.argmin(abs(good - USUAL_ALPHA))], abs=2e-3)
    assert found.doubts[0].startswith("At 0.4, which was right elsewhere, too little would be kept")
    assert found.doubts[0].endswith(f"rollouts at {found.alpha:.2f} and {found.bargain:.2f}.")


@pytest.mark.parametrize("factors", [(0.01, 0.1), (0.01, 300), (40, 0.1), (40, 300)])
def test_neither_units_nor_lengths_nor_counts_change_it(factors):
    """A factor on either likelihood is another unit, other lengths or other counts; a summand is a harder text."""
    for taught in (
        demonstrations,
        lambda a: 9 * (1 - a**5),
    ):  # the second needs another alpha than the usual one
        usual = choose_alpha(line(taught, base_samples))
        other = choose_alpha(
            line(
                lambda a, taught=taught: factors[0] * taught(a) + 3,
                lambda a: factors[1] * base_samples(a) + 100,
            )
        )
        assert (other.alpha, other.bargain) == (usual.alpha, pytest.approx(usual.bargain))


def test_the_shares_are_of_the_most_that_the_line_has():
    found = choose_alpha(line(demonstrations, base_samples))
    lowest = min(map(demonstrations, GRID))
    taught = (demonstrations(0) - demonstrations(found.alpha)) / (demonstrations(0) - lowest)
    kept = (base_samples(1) - base_samples(found.alpha)) / (base_samples(1) - base_samples(0))
    assert (found.taught, found.kept) == (pytest.approx(taught, abs=0.02), pytest.approx(kept, abs=0.02))
    assert found.doubts == ()


@pytest.mark.parametrize("noise", [0.0, 1e-6, 5e-4])
@pytest.mark.parametrize("size", [3.0, 3000.0])
def test_models_that_do_not_differ_are_left_alone(noise, size):
    """Also where the arithmetic of one pass and of the next does: of many tokens by more than of a few."""
    noise *= max(1.0, size / 100)
    found = choose_alpha(
        line(lambda a: size - noise * (7919 * a % 1), lambda a: size + noise * (104729 * a % 1))
    )
    assert (found.alpha, found.taught, found.kept) == (1.0, 1.0, 1.0)
    (doubt,) = found.doubts
    assert doubt.startswith("Nothing differs on the whole line")


@pytest.mark.parametrize(
    "known", [lambda a: 5.0, lambda a: 5 - a, lambda a: 5 + 1e-6 * (104729 * a % 1) + 1e-7 * a]
)
@pytest.mark.parametrize(
    ("taught", "alpha"),
    [
        (lambda a: 20 * (1 - a) ** 3, 0.4),  # of which .784 is left at .4
        (lambda a: 10 * (a - 0.7) ** 2, 0.4),  # .816
        (lambda a: 10 * (1 - a), 0.75),
        (lambda a: 20 - 20 * a**4, 0.916),
    ],
)
def test_where_the_base_loses_nothing_the_demonstrations_share_decides(taught, alpha, known):
    """By the same rule: all of the base's support is kept everywhere, so that the product is the other share."""
    found = choose_alpha(line(taught, known))
    assert found.alpha == pytest.approx(alpha, abs=2e-3)
    assert found.kept == 1.0
    assert found.bargain == pytest.approx(min(GRID, key=taught), abs=0.02)
    assert [doubt[:6] for doubt in found.doubts] == ([] if alpha == 0.4 else ["At 0.4"])


def test_no_alpha_is_named_twice_where_two_are_to_be_compared():
    # A line that SFT's last step alone makes: the bargain is at its end, and so is the first good one.
    found = choose_alpha(line(lambda a: 20.0 if a < 1 else 19.0, lambda a: 5.0))
    assert found.doubts[0].endswith("Compare a few rollouts at 0.95 and 1.00.")
    for step, found_alpha, told in ((0.01, 0.408, "0.41 and 0.40"), (0.004, 0.403, "0.403 and 0.400")):
        grid = (0.0, 0.4, 0.4 + step, 0.4 + 2 * step, 1.0)
        alike = choose_alpha(line(lambda a, at=grid[2]: 19.0 if a == at else 20.0, lambda a: 5.0, grid=grid))
        assert (alike.alpha, alike.bargain) == (found_alpha, pytest.approx(grid[2]))
        assert alike.doubts[0].endswith(f"Compare a few rollouts at {told}.")


def test_demonstrations_that_sft_made_no_likelier_are_refused():
    with pytest.raises(
        ValueError, match=r"likeliest under the base \(5.00 nats a response, 8.00 under the SFT"
    ):
        choose_alpha(line(lambda a: 5 + 3 * a, base_samples))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_refused(bad, which):
    curves = [demonstrations, base_samples]
    broken = curves[which]
    curves[which] = lambda a: bad if a == 1 else broken(a)
    with pytest.raises(ValueError, match="Expected finite likelihoods on the line .* at alpha 1 the"):
        choose_alpha(line(*curves))


def test_it_says_if_no_alpha_keeps_both():
    _, doubt = choose_alpha(line(lambda a: 20 - 20 * a**6, lambda a: 5 + 9 * (1 - (1 - a) ** 3))).doubts
    assert doubt.startswith("No alpha keeps both: at 0.")


def test_it_says_if_the_format_is_lost_there():
    (doubt,) = choose_alpha(line(demonstrations, base_samples, lambda a: a**4)).doubts
    assert "probability of only 0.0" in doubt
    assert choose_alpha(line(demonstrations, base_samples, lambda a: a)).doubts == ()


def judged_at(search, right, judged=32):
    """What a verifier says at each alpha, and at which it was asked."""
    asked = []

    def right_at(alpha):
        asked.append(alpha)
        return right(alpha), judged

    return with_rollouts(search, right_at), asked


def test_rollouts_that_are_right_leave_alpha_as_it_is():
    search = choose_alpha(line(demonstrations, base_samples))
    found, asked = judged_at(search, lambda alpha: 8)
    assert (found.alpha, found.right, found.judged, found.doubts) == (search.alpha, 0.25, 32, ())
    assert (found.raised_from, asked) == (None, [search.alpha])


def test_alpha_is_raised_until_a_rollout_is_right():
    search = choose_alpha(line(demonstrations, base_samples))
    found, asked = judged_at(search, lambda alpha: 12 * (alpha > search.alpha + 0.15), 48)
    assert asked == [0.4, 0.5, 0.6]
    assert (found.alpha, found.raised_from, found.right, found.judged) == (0.6, 0.4, 0.25, 48)
    assert found.taught > search.taught
    assert found.kept < search.kept
    assert found.doubts[-1] == "None of 48 rollouts is right at alpha 0.40: it was raised to 0.60."


def test_after_a_raise_doubts_are_about_the_alpha_that_is_taken():
    curve = line(lambda a: 20 * (1 - a) ** 2, lambda a: 5 + 20 * a**1.2, lambda a: a**3)
    search = choose_alpha(curve)
    assert len(search.doubts) == 2
    assert "at 0.40 there is 64%" in search.doubts[0]
    assert "probability of only 0.064" in search.doubts[1]
    found, _ = judged_at(search, lambda alpha: int(alpha > 0.65))
    assert found.doubts == (
        "This alpha does not keep both: at 0.70 there is 91% of what SFT taught and 35% of the base's support.",
        "None of 32 rollouts is right at alpha 0.40: it was raised to 0.70.",
    )
    unusual = choose_alpha(line(lambda a: 9 * (1 - a) ** 8, lambda a: 2 + 9 * (1 - (1 - a) ** 6)))
    assert unusual.doubts[0].startswith("At 0.4")
    raised, _ = judged_at(unusual, lambda alpha: int(alpha > unusual.alpha))
    assert not any(doubt.startswith("At 0.4") for doubt in raised.doubts)  # it is not what is compared now


def test_a_few_rollouts_raise_nothing():
    search = choose_alpha(line(demonstrations, base_samples))
    found, asked = judged_at(search, lambda alpha: 0, 31)
    assert (found.alpha, found.right, found.judged, asked) == (search.alpha, 0.0, 31, [search.alpha])
    assert not found.found_nothing_right
    assert "None of 31 rollouts is right" in found.doubts[0]
    assert "which are too few to tell" in found.doubts[0]


def test_alpha_is_not_raised_for_nothing():
    search = choose_alpha(line(demonstrations, base_samples))
    found, asked = judged_at(search, lambda alpha: 0)
    assert (found.alpha, found.right, found.raised_from) == (search.alpha, 0.0, None)
    assert found.found_nothing_right
    np.testing.assert_allclose(asked, search.alpha + np.array([0, 0.1, 0.2, 0.3]))
    assert found.doubts[0].startswith(
        "None of 32 rollouts is right at alpha 0.40, nor at any up to 0.70: RL will"
    )


def test_at_the_end_of_the_line_there_is_no_larger_alpha():
    search = choose_alpha(line(lambda a: 3.0, lambda a: 5.0))
    found, asked = judged_at(search, lambda alpha: 0)
    assert asked == [1.0]
    assert found.doubts[-1].startswith(
        "None of 32 rollouts is right at alpha 1.00: RL will have nothing to reward"
    )


@pytest.mark.parametrize("taught_power", [1, 2, 4, 8])
@pytest.mark.parametrize("known_power", [1, 2, 4, 8])
def test_where_six_points_are_clear_ten_say_the_same(taught_power, known_power):
    def taught(alpha):
        return 20 * (1 - alpha) ** taught_power

    def known(alpha):
        return 5 + 20 * alpha**known_power

    first, whole = line(taught, known, grid=FIRST), line(taught, known)
    products = [(20 - taught(a)) * (known(1) - known(a)) for a in FIRST]
    assert is_clear(first) == ((20 - taught(0.4)) * (known(1) - known(0.4)) >= 0.85 * max(products))
    if is_clear(first):
        assert choose_alpha(first).alpha == choose_alpha(whole).alpha == USUAL_ALPHA


def test_a_line_on_which_only_one_side_can_lose_is_looked_at_closer():
    assert not is_clear(line(lambda alpha: 8 - 7 * alpha, lambda alpha: 3.0, grid=FIRST))
    assert not is_clear(line(lambda alpha: 8.0, lambda alpha: 3 + alpha, grid=FIRST))


def test_a_line_with_a_value_that_is_not_finite_is_not_looked_at_any_closer():
    with pytest.raises(NoAlpha, match="at alpha 0.2 the demonstrations cost nan"):
        is_clear(line(lambda alpha: math.nan if alpha == 0.2 else 1 - alpha, base_samples, grid=FIRST))


def test_where_no_point_keeps_both_a_closer_look_is_taken():
    """Over-trained, with demonstrations that gain at the very end alone: between the six points lies a good alpha."""

    def taught(alpha):
        return 20 * (1 - 1 / (1 + math.exp(-(alpha - 0.886) / 0.197))) + 12.565 * alpha**2

    first, whole = (line(taught, lambda alpha: 5 + 20 * alpha**2, grid=grid) for grid in (FIRST, GRID))
    assert not is_clear(first)
    assert choose_alpha(whole).alpha == pytest.approx(0.124, abs=1e-3)
