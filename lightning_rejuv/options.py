"""The options of a rejuvenation and what they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_rejuv.attribution import POSITION_RULES, RANKINGS, SCOPES, PositionRule, RankBy, Scope

Alpha = float | Literal["auto"]


@dataclass(frozen=True)
class Options:
    """Checked options of :func:`lightning_rejuv.rejuvenate`, which says what each one means.

    Raises:
        ValueError: one is out of range, with its name, what was expected and what was got.

    >>> Options(alpha=1.5)
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `alpha` to be a number in [0, 1] or "auto" but got 1.5.
    """

    alpha: Alpha = 0.5
    reset_fraction: float = 0.01
    omega: float = 1.0
    positions: PositionRule = "sharpened"
    positions_per_response: int = 1
    rank_by: RankBy = "absolute"
    scope: Scope = "model"
    target_excess: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not _is_share(self.alpha):
            raise ValueError(
                f'Expected argument `alpha` to be a number in [0, 1] or "auto" but got {self.alpha!r}.'
            )
        for name in ("reset_fraction", "omega"):
            if not _is_share(getattr(self, name)):
                got = getattr(self, name)
                raise ValueError(f"Expected argument `{name}` to be a number in [0, 1] but got {got!r}.")
        choices = {"positions": POSITION_RULES, "rank_by": RANKINGS, "scope": SCOPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ValueError(f"Expected argument `{name}` to be one of {allowed} but got {got!r}.")
        if self.positions_per_response < 1:
            got = self.positions_per_response
            raise ValueError(f"Expected argument `positions_per_response` to be at least 1 but got {got}.")
        if not self.target_excess > 0:
            got = self.target_excess
            raise ValueError(f"Expected argument `target_excess` to be a positive number but got {got}.")


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0.0 <= value <= 1.0
