"""Finding alpha: how much of the SFT model a fusion can keep before the base's support is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_TOLERANCE = 0.005


@dataclass(frozen=True)
class AlphaSearch:
    """What the search found, and the curve it walked along.

    Attributes:
        alpha: the largest alpha found whose excess is at most ``target``.
        target: the excess negative log-likelihood that is allowed, nats per response.
        curve: (alpha, excess) for every alpha that was tried, in order of alpha.
    """

    alpha: float
    target: float
    curve: list[tuple[float, float]]


def search_alpha(excess: Callable[[float], float], target: float) -> AlphaSearch:
    """Bisect for the alpha at which the excess negative log-likelihood reaches a target.

    ``excess(alpha)`` is how much less likely, in nats per response, the fused model finds what the base
    samples than the base itself does: 0 at alpha = 0 and growing with alpha, since over-training takes
    the base's alternatives away. No reward and no RL run is needed.

    Args:
        excess: evaluates one alpha.
        target: allowed excess, nats per response, > 0.

    Returns:
        The search; ``alpha`` is 1 where even the SFT model itself stays within the target.

    Raises:
        ValueError: the target is not positive.

    >>> search = search_alpha(lambda alpha: 4 * alpha**2, target=1.0)
    >>> round(search.alpha, 2), len(search.curve)
    (0.5, 9)
    """
    if not target > 0:
        raise ValueError(f"Expected argument `target` to be a positive number of nats but got {target}.")
    low, high = 0.0, 1.0
    curve = [(high, excess(high))]
    if curve[0][1] <= target:
        return AlphaSearch(1.0, target, curve)
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        curve.append((middle, excess(middle)))
        low, high = (middle, high) if curve[-1][1] <= target else (low, middle)
    return AlphaSearch(low, target, sorted(curve))
