"""The options of a rejuvenation and what they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from lightning_rejuv.access.optimizer_state import OPTIMIZER_STATES, OptimizerState
from lightning_rejuv.alpha import ALPHA_RULES, AlphaRule
from lightning_rejuv.attribution import POSITION_RULES, RANKINGS, SCOPES, PositionRule, RankBy, Scope
from lightning_rejuv.names import listing

Alpha = float | AlphaRule | Mapping[str, float]
# Where alpha cannot be searched for; see docs/evidence.md, "Fixed alpha". The paper's is 0.5.
FIXED_ALPHA = 0.4
Quantity = Literal["entropy_gradient", "target_logit"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
Budget = Literal["share", "union"]
BUDGETS: tuple[str, ...] = get_args(Budget)
Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


@dataclass(frozen=True)
class Options:
    """Checked options of :func:`lightning_rejuv.rejuvenate`, which says what each one means.

    Raises:
        ValueError: one is out of range, with its name, what was expected and what was got.

    >>> Options(omega=1.5)
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `omega` to be a number in [0, 1] but got 1.5.
    """

    alpha: Alpha = "auto"
    reset_fraction: float = 0.02
    omega: float = 1.0
    positions: PositionRule = "sharpened"
    positions_per_response: int = 1
    quantity: Quantity = "entropy_gradient"
    rank_by: RankBy | None = None
    scope: Scope = "model"
    budget: Budget = "share"
    alpha_target: float | None = None
    optimizer_state: OptimizerState = "momentum"
    rounding: Rounding = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)
        for name in ("reset_fraction", "omega"):
            if not _is_share(getattr(self, name)):
                got = getattr(self, name)
                raise ValueError(f"Expected argument `{name}` to be a number in [0, 1] but got {got!r}.")
        choices = {
            "positions": POSITION_RULES,
            "quantity": QUANTITIES,
            "rank_by": (*RANKINGS, None),
            "scope": SCOPES,
            "budget": BUDGETS,
            "optimizer_state": OPTIMIZER_STATES,
            "rounding": ROUNDINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ValueError(f"Expected argument `{name}` to be one of {allowed} but got {got!r}.")
        if self.positions_per_response < 1:
            got = self.positions_per_response
            raise ValueError(f"Expected argument `positions_per_response` to be at least 1 but got {got}.")
        if self.alpha_target is not None and not 0 <= self.alpha_target < float("inf"):
            got = self.alpha_target
            raise ValueError(f"Expected argument `alpha_target` to be a number of at least 0 but got {got}.")
        if self.alpha_target is not None and not self.searches_alpha:
            raise ValueError(
                f"`alpha_target` belongs to a rule that finds alpha, but alpha={self.alpha!r} is given."
            )
        if self.budget == "union" and (self.scope != "model" or self.quantity != "target_logit"):
            raise ValueError(
                'Expected `scope="model"` and `quantity="target_logit"` with `budget="union"`, the paper\'s rule, '
                f"but got scope={self.scope!r} and quantity={self.quantity!r}."
            )

    @property
    def searches_alpha(self) -> bool:
        """Whether alpha is to be found rather than given."""
        return isinstance(self.alpha, str)

    @property
    def runs_the_model(self) -> bool:
        """Whether the model has to be run before it can be edited; fusion with a number needs the weights alone."""
        return self.reset_fraction > 0 or self.searches_alpha


def alpha_by_name(alpha: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """Give every parameter its alpha.

    Args:
        alpha: one for all, or one for each name pattern (``*`` and ``?``); the first that fits counts.
        names: the parameters.

    Raises:
        ValueError: a parameter that no pattern fits, or a pattern that fits no parameter.

    >>> alpha_by_name({"*.mlp.*": 0.3, "*": 0.6}, ["layers.0.mlp.weight", "embed.weight"])
    {'layers.0.mlp.weight': 0.3, 'embed.weight': 0.6}
    """
    if not isinstance(alpha, Mapping):
        return dict.fromkeys(names, float(alpha))
    found: dict[str, float] = {}
    idle = set(alpha)
    for name in names:
        for pattern, value in alpha.items():
            if fnmatchcase(name, pattern):
                idle.discard(pattern)
                found.setdefault(name, float(value))
    missing = [name for name in names if name not in found]
    if missing or idle:
        raise ValueError(
            "Expected the patterns of `alpha` and the parameters to fit each other but no pattern fits "
            f"{listing(missing)} and no parameter fits {listing(idle)}. End with the pattern '*' to cover the rest."
        )
    return found


def _check_alpha(alpha: object) -> None:
    if isinstance(alpha, Mapping):
        wrong = {pattern: value for pattern, value in alpha.items() if not _is_share(value)}
        if wrong or not alpha:
            raise ValueError(
                f"Expected every value of `alpha` to be a number in [0, 1] but got {wrong or alpha}."
            )
    elif not (alpha in ALPHA_RULES if isinstance(alpha, str) else _is_share(alpha)):
        raise ValueError(
            f"Expected argument `alpha` to be a number in [0, 1], a mapping of name patterns to such numbers or "
            f"one of {ALPHA_RULES} but got {alpha!r}."
        )


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0
