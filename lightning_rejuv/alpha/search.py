"""Which alpha: the usual one, if it is a good bargain between what SFT taught and what the base could say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_rejuv.alpha.doubts import counted
from lightning_rejuv.config import USUAL_ALPHA
from lightning_rejuv.verdict import FORMAT_AT_RISK

#: It is taken if the product of the shares that are kept is at least so much of the largest on the line.
_GOOD = 0.75
#: Where the line is looked at, and where it is looked at first; between the points the shares are interpolated in such
#: steps.
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
FIRST = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_STEP = 0.001
#: If the product at the usual alpha is so much of the largest at FIRST, a closer look would hardly take another alpha:
#: on no measured line did GRID lower that share by as much as the difference (docs/alpha.md).
_CLEAR = _GOOD + 0.1
#: Below such a product of the shares that are kept, no alpha keeps both: the root of it is 0.71.
_KEPT = 0.5
#: By how much alpha is raised if no rollout is right, and how often at most.
_RAISE, _RAISES = 0.1, 3
#: With so many rollouts none is right in one of 29 searches at a pass@1 of 0.1.
_ROLLOUTS = 32
#: What differs by less is the same. In nats a response: RL would not notice one that is likelier by a thousandth. And
#: in parts of the largest value: it is a sum over tokens, computed in float32, where errors of a millionth are usual.
_SAME, _SAME_SHARE = 1e-3, 1e-5
_NOTHING = (
    "Nothing differs on the whole line: at no alpha are the demonstrations likelier than under the base, or the base's "
    "samples likelier than under the SFT model. There is nothing to fuse."
)


@dataclass(frozen=True)
class AlphaPoint:
    """What was measured at one alpha.

    Attributes:
        alpha: weight of the SFT model.
        demonstrations: negative log-likelihood of held-out demonstrations, nats per response.
        base_samples: the same of responses that the base sampled.
        format: probability of the format that the demonstrations share and the base did not know, 0 to 1.
        entropy: mean token entropy on the demonstrations, nats; NaN if it was not measured.
    """

    alpha: float
    demonstrations: float
    base_samples: float
    format: float
    entropy: float = math.nan


@dataclass(frozen=True)
class AlphaSearch:
    """How alpha was found.

    Attributes:
        rule: the rule, ``"auto"``.
        alpha: what it found.
        bargain: where on the line the product of the two shares is largest.
        taught: share of what SFT taught, as the demonstrations tell, that is kept there; 1 is the most on the line.
        kept: share of the base's support, as its samples tell, that is kept there; 1 is the most on the line.
        curve: what was measured, in order of alpha, from 0 to 1.
        responses: how many responses the base sampled.
        unfinished: how many of them came to no end-of-sequence token; None if the sampler does not say.
        right: share of responses sampled at ``alpha`` that the verifier accepts; None without a verifier.
        judged: how many responses sampled at ``alpha`` it judged; None without a verifier.
        raised_from: what the curve alone said, if ``alpha`` was raised because no response was right at it; else None.
        doubts: what speaks against the answer, in sentences; empty if nothing does.
    """

    rule: str
    alpha: float
    bargain: float
    taught: float
    kept: float
    curve: list[AlphaPoint]
    responses: int = 0
    unfinished: int | None = None
    right: float | None = None
    judged: int | None = None
    raised_from: float | None = None
    doubts: tuple[str, ...] = ()

    @property
    def found_nothing_right(self) -> bool:
        """Whether no rollout was right at any alpha that was tried, though there were enough of them to tell."""
        return self.right == 0 and self.judged is not None and self.judged >= _ROLLOUTS


class NoAlpha(ValueError):
    """A search came to no alpha.

    Attributes:
        curve: what was measured, in order of alpha, from 0 to 1.
    """

    def __init__(self, message: str, curve: Sequence[AlphaPoint]) -> None:
        super().__init__(message)
        self.curve = list(curve)


def choose_alpha(curve: Sequence[AlphaPoint]) -> AlphaSearch:
    """Choose the usual alpha of 0.4 if it is a good bargain between both parents, else the nearest alpha that is.

    The demonstrations gain ``D(0) - D(alpha)`` over the base, the base's own samples ``B(1) - B(alpha)`` over the SFT
    model, where D and B are negative log-likelihoods. Where the product of these gains is largest, neither can gain by
    a factor what the other does not lose by a larger one: the Nash bargaining solution (Nash 1950, "The Bargaining
    Problem"). An alpha is a good bargain if the product is at least three quarters of that. Neither the unit nor the
    number nor the length of the responses matters, since a factor on D or B changes nothing. The bargaining solution
    itself was right on fewer lines than the usual alpha (docs/alpha.md); it tells whether the line is an unusual one.

    If the base's samples are nowhere likelier than under the SFT model, by a thousandth of a nat and a
    hundred-thousandth of their likelihood, there is nothing to lose: all of the base's support is kept everywhere, and
    the product is the demonstrations' share.

    Args:
        curve: at least three points in order of alpha, the first at 0 and the last at 1.

    Returns:
        The search, with the doubts that the curve itself raises. ``alpha`` is 1 if nothing differs on the whole line.

    Raises:
        NoAlpha: a value is not finite, or the demonstrations are nowhere likelier than under the base.

    >>> line = [AlphaPoint(a / 10, 20 * (1 - a / 10) ** 2, 5 + 20 * (a / 10) ** 2, 1.0) for a in range(11)]
    >>> found = choose_alpha(line)
    >>> found.alpha, round(found.bargain, 3)
    (0.4, 0.5)
    """
    _check_finite(curve)
    base, sft = curve[0], curve[-1]
    most_taught, most_lost = _most(curve)
    if not most_taught and not most_lost:
        return AlphaSearch("auto", 1.0, 1.0, 1.0, 1.0, list(curve), doubts=(_NOTHING,))
    if not most_taught:
        raise NoAlpha(
            "Expected calibration demonstrations that SFT made likelier but on the whole line between base and SFT "
            f"model they are likeliest under the base ({base.demonstrations:.2f} nats a response, "
            f"{sft.demonstrations:.2f} under the SFT model). Are `model` and `anchor` swapped? Pass held-out "
            "demonstrations of the kind that SFT trained on, or a number for `alpha`.",
            curve,
        )
    values = [math.prod(shares) for shares in _shares(curve)]
    best = max(range(len(curve)), key=values.__getitem__)
    bargain = _peak([point.alpha for point in curve], values, best)
    alpha = _nearest(curve, _GOOD * values[best])
    search = AlphaSearch("auto", alpha, bargain, *shares_at(curve, alpha), list(curve))
    return replace(search, doubts=tuple(_doubts(search)))


def is_clear(curve: Sequence[AlphaPoint]) -> bool:
    """Tell whether a few points of a line, those at ``FIRST``, leave no doubt that alpha is the usual one.

    Raises:
        NoAlpha: a value is not finite.

    >>> line = [AlphaPoint(a, 20 * (1 - a) ** 2, 5 + 20 * a**2, 1.0) for a in FIRST]
    >>> is_clear(line)
    True
    """
    _check_finite(curve)
    if not all(_most(curve)):
        return False
    largest = max(math.prod(shares) for shares in _shares(curve))
    return largest > 0 and math.prod(shares_at(curve, USUAL_ALPHA)) >= _CLEAR * largest


def shares_at(curve: Sequence[AlphaPoint], alpha: float) -> tuple[float, float]:
    """Interpolate which shares of what SFT taught and of the base's support are kept at an alpha."""
    taught, kept = zip(*_shares(curve), strict=True)
    alphas = [point.alpha for point in curve]
    return _between(alpha, alphas, taught), _between(alpha, alphas, kept)


def _most(curve: Sequence[AlphaPoint]) -> tuple[float, float]:
    """Return how much likelier the demonstrations, and the base's samples, become on the line at most, nats.

    0 if that is not to be told from nothing.
    """
    demonstrations = [point.demonstrations for point in curve]
    base_samples = [point.base_samples for point in curve]
    return _gain(demonstrations, demonstrations[0]), _gain(base_samples, base_samples[-1])


def _gain(values: Sequence[float], end: float) -> float:
    gain = end - min(values)
    return gain if gain > max(_SAME, _SAME_SHARE * max(map(abs, values))) else 0.0


def _shares(curve: Sequence[AlphaPoint]) -> list[tuple[float, float]]:
    """Return for each point which shares of what SFT taught and of the base's support are kept.

    Of what cannot be lost all is kept.
    """
    most_taught, most_lost = _most(curve)
    return [
        (
            max(0.0, curve[0].demonstrations - point.demonstrations) / most_taught if most_taught else 1.0,
            max(0.0, curve[-1].base_samples - point.base_samples) / most_lost if most_lost else 1.0,
        )
        for point in curve
    ]


def _check_finite(curve: Sequence[AlphaPoint]) -> None:
    for point in curve:
        if not (math.isfinite(point.demonstrations) and math.isfinite(point.base_samples)):
            raise NoAlpha(
                f"Expected finite likelihoods on the line between base and SFT model but at alpha {point.alpha:g} the "
                f"demonstrations cost {point.demonstrations:g} nats a response and the base's samples "
                f"{point.base_samples:g}. Has the model diverged, or do its logits overflow? Run it in float32 or "
                "bfloat16, or pass a number for `alpha`.",
                curve,
            )


def _nearest(curve: Sequence[AlphaPoint], good: float) -> float:
    """Return the alpha nearest to the usual one at which the product of both shares is good."""
    line = (round(number * _STEP, 3) for number in range(round(1 / _STEP) + 1))
    outward = sorted(line, key=lambda alpha: abs(alpha - USUAL_ALPHA))
    return next(alpha for alpha in outward if math.prod(shares_at(curve, alpha)) >= good)


def _peak(alphas: Sequence[float], values: Sequence[float], best: int) -> float:
    """Return where a parabola through the highest point and its neighbours is highest."""
    if best in (0, len(values) - 1):
        return alphas[best]
    left, middle, right = alphas[best - 1 : best + 2]
    below_left, below_right = (values[best] - values[best + side] for side in (-1, 1))
    slope_left, slope_right = (middle - left) * below_right, (right - middle) * below_left
    if slope_left + slope_right == 0:  # all three are equal
        return middle
    return middle - ((middle - left) * slope_left - (right - middle) * slope_right) / (
        2 * (slope_left + slope_right)
    )


def _between(alpha: float, alphas: Sequence[float], values: Sequence[float]) -> float:
    """Interpolate linearly."""
    at = next(number for number in range(1, len(alphas)) if alpha <= alphas[number])
    share = (alpha - alphas[at - 1]) / (alphas[at] - alphas[at - 1])
    return (1 - share) * values[at - 1] + share * values[at]


def _doubts(search: AlphaSearch) -> Iterator[str]:
    """Say what speaks against a search's alpha: that the curve found, or one that it was raised to."""
    alpha, curve, raised = search.alpha, search.curve, search.raised_from is not None
    if alpha != USUAL_ALPHA and not raised:
        other = search.bargain if round(search.bargain, 2) != round(alpha, 2) else USUAL_ALPHA
        digits = 2 if round(alpha, 2) != USUAL_ALPHA else 3
        yield (
            f"At {USUAL_ALPHA:g}, which was right elsewhere, too little would be kept of what SFT taught or of the "
            f"base's support. Compare a few rollouts at {alpha:.{digits}f} and {other:.{digits}f}."
        )
    if search.taught * search.kept < _KEPT:
        yield (
            f"{'This alpha does not keep' if raised else 'No alpha keeps'} both: at {alpha:.2f} there is "
            f"{search.taught:.0%} of what SFT taught and {search.kept:.0%} of the base's support."
        )
    if (form := _between(alpha, [p.alpha for p in curve], [p.format for p in curve])) < FORMAT_AT_RISK:
        more = "" if raised else " Sample a few rollouts; if none is right, take a larger alpha."
        yield (
            f"The format that the demonstrations share has a probability of only {form:.3f} there: RL may find too "
            f"little to reward.{more}"
        )


def with_rollouts(search: AlphaSearch, right_at: Callable[[float], tuple[int, int]]) -> AlphaSearch:
    """Have a few rollouts checked, and raise alpha if none of them is right: the format, or the skill, is lost there.

    Fewer than 32 rollouts raise nothing: none of a few is right at many a pass@1 that RL can start from.

    Args:
        search: what the curve said; its doubts are of the curve alone, and are made anew if alpha is raised.
        right_at: samples responses at an alpha; returns how many a verifier accepts, and how many it judged, at least
            one.

    >>> line = [AlphaPoint(a / 10, 20 * (1 - a / 10) ** 2, 5 + 20 * (a / 10) ** 2, 1.0) for a in range(11)]
    >>> found = with_rollouts(choose_alpha(line), lambda alpha: (32 if alpha > 0.45 else 0, 32))
    >>> found.alpha, found.raised_from, found.doubts
    (0.5, 0.4, ('None of 32 rollouts is right at alpha 0.40: it was raised to 0.50.',))
    """
    alpha = search.alpha
    right, judged = right_at(alpha)
    search = replace(search, right=right / judged, judged=judged)
    if right:
        return search
    none = f"None of {counted(judged, 'rollout')} is right at alpha {alpha:.2f}"
    if judged < _ROLLOUTS:
        few = f"{none}, which are too few to tell: {_ROLLOUTS} calibration prompts and more would."
        return replace(search, doubts=(*search.doubts, few))
    for raised in range(1, _RAISES + 1):
        if alpha == 1.0:
            break
        alpha = round(min(1.0, search.alpha + raised * _RAISE), 3)
        right, judged = right_at(alpha)
        if right:
            return _raised(search, alpha, right / judged, judged, f"{none}: it was raised to {alpha:.2f}.")
    larger = "" if alpha == search.alpha else f", nor at any up to {alpha:.2f}"
    hopeless = f"{none}{larger}: RL will have nothing to reward. Do more SFT, or a refit."
    return replace(search, doubts=(*search.doubts, hopeless))


def _raised(search: AlphaSearch, alpha: float, right: float, judged: int, doubt: str) -> AlphaSearch:
    taught, kept = shares_at(search.curve, alpha)
    found = replace(
        search,
        alpha=alpha,
        taught=taught,
        kept=kept,
        right=right,
        judged=judged,
        raised_from=search.alpha,
    )
    return replace(found, doubts=(*_doubts(found), doubt))
