"""Finding alpha: how much of the SFT model a fusion can keep before the base's support is lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

AlphaRule = Literal["auto", "support_retention", "kl_balance", "entropy_ratio"]
ALPHA_RULES: tuple[str, ...] = get_args(AlphaRule)

# Nats per response that the excess may reach, up to this many tokens a response; beyond, in proportion to
# the length. Responses of 10 to 25 tokens are what the number was found on.
EXCESS_NATS, EXCESS_TOKENS = 1.0, 20.0
SUPPORT_NATS = 2.0
ENTROPY_RATIO = 0.5

_TOLERANCE = 0.005

MEANINGS: dict[str, str] = {
    "auto": "excess NLL, nats per response that the anchor sampled",
    "support_retention": "excess NLL, nats per verified response that the anchor sampled",
    "kl_balance": "excess NLL on the anchor's own responses less that on the model's own, nats per response",
    "entropy_ratio": "share of the anchor's token entropy that is lost on its own responses",
}


@dataclass(frozen=True)
class AlphaSearch:
    """What a search for alpha found, and the curve it walked along.

    Attributes:
        rule: what was searched for, one of :data:`ALPHA_RULES`.
        alpha: the largest alpha found whose value is at most ``target``; 0, the anchor itself, where that of none
            that was tried is.
        target: what the value may reach.
        curve: (alpha, value) for every alpha that was tried, in order of alpha.
        doubts: why the search is not sure, in whole sentences; empty if it is.
    """

    rule: str
    alpha: float
    target: float
    curve: list[tuple[float, float]]
    doubts: tuple[str, ...] = ()


def default_target(rule: str, tokens_per_response: float) -> float:
    """Return the target of a rule where the caller gives none.

    For ``"auto"`` it is 1 nat per response of up to 20 tokens and grows in proportion to longer ones, since
    two equally good models differ by more on longer texts.

    >>> default_target("auto", 12), default_target("auto", 200)
    (1.0, 10.0)
    """
    if rule == "auto":
        return EXCESS_NATS * max(1.0, tokens_per_response / EXCESS_TOKENS)
    return {"support_retention": SUPPORT_NATS, "kl_balance": 0.0, "entropy_ratio": 1 - ENTROPY_RATIO}[rule]


def search_alpha(value: Callable[[float], float], target: float, rule: str = "auto") -> AlphaSearch:
    """Bisect for the alpha at which a value that grows with alpha reaches its target.

    Args:
        value: evaluates one alpha.
        target: what the value may reach.
        rule: what is searched for, for the report.

    Returns:
        The search; ``alpha`` is 1 where even the SFT model itself stays within the target, and 0, with a warning,
        where no alpha that was tried does.

    >>> search = search_alpha(lambda alpha: 4 * alpha**2, target=1.0)
    >>> round(search.alpha, 2), len(search.curve)
    (0.5, 9)
    """
    low, high = 0.0, 1.0
    curve = [(high, value(high))]
    if curve[0][1] <= target:
        return AlphaSearch(rule, 1.0, target, curve)
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        curve.append((middle, value(middle)))
        low, high = (middle, high) if curve[-1][1] <= target else (low, middle)
    if low == 0.0:
        least, reached = min(curve)
        warnings.warn(
            f"The search for alpha={rule!r} found none within its target of {target:g}: at {least:g} the value is "
            f"{reached:g} ({MEANINGS[rule]}). At alpha 0 nothing of SFT is left: the model is its anchor. Raise "
            "`alpha_target`, or pass a number for `alpha`.",
            stacklevel=2,
        )
    return AlphaSearch(rule, low, target, sorted(curve))
