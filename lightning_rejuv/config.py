"""The options of a rejuvenation and what they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal, get_args

from lightning_rejuv.alpha import ALPHA_RULES, AlphaRule
from lightning_rejuv.attribution import POSITION_RULES, RANKINGS, SCOPES, PositionRule, RankBy, Scope
from lightning_rejuv.names import canonical_name, listing
from lightning_rejuv.weights.optimizer_state import OPTIMIZER_STATES, OptimizerState

Alpha = float | AlphaRule | Mapping[str, float]
Quantity = Literal["entropy_gradient", "target_logit"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
Budget = Literal["share", "union"]
BUDGETS: tuple[str, ...] = get_args(Budget)
Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "positions": POSITION_RULES,
    "quantity": QUANTITIES,
    "rank_by": (*RANKINGS, None),
    "scope": SCOPES,
    "budget": BUDGETS,
    "optimizer_state": OPTIMIZER_STATES,
    "rounding": ROUNDINGS,
}
# What only a reset has.
OF_THE_RESET = ("omega", "positions", "positions_per_response", "quantity", "rank_by", "scope", "budget")
# What calibration data are for, in messages.
USES_OF_CALIBRATION = '`alpha="auto"`, a `reset_fraction` above 0 or `refit`'
_ANY = float("inf")
_LONGEST = 200  # characters of a value in a message
# What PyTorch takes as a seed.
_INTEGERS: dict[str, tuple[int, float]] = {
    "positions_per_response": (1, _ANY),
    "seed": (-(2**63), 2**64 - 1),
}
# Of a refit, where the caller names none: with the whole model, and with adapters alone, whose B starts at zero.
LEARNING_RATE, LEARNING_RATE_OF_ADAPTERS = 2e-5, 2e-4


@dataclass(frozen=True)
class Refit:
    """A few plain training steps after the edit, on calibration responses and the base's own samples together.

    AdamW (betas 0.9 and 0.999, no weight decay, a constant learning rate) on the negative log-likelihood of response
    tokens, in nats a response; see :mod:`lightning_rejuv.refit`. Every parameter that requires a gradient is trained.

    Attributes:
        steps: how many updates are made.
        learning_rate: AdamW's; None for 2e-5, or 2e-4 for a model with adapters (PEFT). The small models of the demo,
            of some 100 thousand weights, were refitted with 5e-4.
        batch_size: how many responses an update is made from; all of them where there are fewer. It takes no memory:
            no pass through the model has more tokens than the largest batch of the data.

    Raises:
        ValueError: one is out of range, with its name, what was expected and what was got.

    >>> Refit(steps=0)
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `steps` of `Refit` to be an integer of at least 1 but got 0.
    """

    steps: int = 20
    learning_rate: float | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            got = getattr(self, name)
            object.__setattr__(self, name, number := _integer(got))
            if number is None or number < 1:
                raise ValueError(
                    f"Expected argument `{name}` of `Refit` to be an integer of at least 1 but got {_shown(got)}."
                )
        if (rate := self.learning_rate) is not None:
            object.__setattr__(self, "learning_rate", real := _number(rate))
            if real is None or not 0.0 < real < _ANY:
                raise ValueError(
                    "Expected argument `learning_rate` of `Refit` to be a finite number above 0 but got "
                    f"{_shown(rate)}."
                )


@dataclass(frozen=True)
class Options:
    """Checked options of :func:`lightning_rejuv.rejuvenate`, which says what each one means.

    Raises:
        ValueError: one is out of range, with its name, what was expected and what was got; or it says how neurons are
            reset, and none is.

    >>> Options(omega=1.5)
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `omega` to be a number in [0, 1] but got 1.5.
    """

    alpha: Alpha = "auto"
    reset_fraction: float = 0.0
    omega: float = 1.0
    positions: PositionRule = "sharpened"
    positions_per_response: int = 1
    quantity: Quantity = "entropy_gradient"
    rank_by: RankBy | None = None
    scope: Scope = "model"
    budget: Budget = "share"
    optimizer_state: OptimizerState = "momentum"
    rounding: Rounding = "stochastic"
    seed: int = 0
    refit: Refit | None = None

    def __post_init__(self) -> None:
        # From here on every value is a plain number or string, so that nothing that follows can fail over its type.
        self._set("alpha", _checked_alpha(self.alpha))
        for name in ("reset_fraction", "omega"):
            got = getattr(self, name)
            self._set(name, share := _number(got))
            if share is None or not 0.0 <= share <= 1.0:
                raise ValueError(
                    f"Expected argument `{name}` to be a number in [0, 1] but got {_shown(got)}."
                )
        for name, allowed in _CHOICES.items():
            got = getattr(self, name)
            fitting = [a for a in allowed if got is a or (isinstance(got, str) and got == a)]
            if not fitting:
                raise ValueError(f"Expected argument `{name}` to be one of {allowed} but got {_shown(got)}.")
            self._set(name, fitting[0])
        for name, (low, high) in _INTEGERS.items():
            got = getattr(self, name)
            self._set(name, number := _integer(got))
            if number is None or not low <= number <= high:
                most = "" if high is _ANY else f" and at most {high}"
                raise ValueError(
                    f"Expected argument `{name}` to be an integer of at least {low}{most} but got {_shown(got)}."
                )
        if not (self.refit is None or isinstance(self.refit, Refit)):
            raise ValueError(
                f"Expected argument `refit` to be a `Refit` or None but got {_shown(self.refit)}."
            )
        self._check_reset()

    def _check_reset(self) -> None:
        usual = {field.name: field.default for field in fields(self)}
        idle = [name for name in OF_THE_RESET if getattr(self, name) != usual[name]]
        if idle and not self.reset_fraction:
            raise ValueError(
                f"Expected no {', '.join(f'`{name}`' for name in idle)} without a reset, but `reset_fraction` is 0: it "
                "would have no effect. Leave it out, or pass a `reset_fraction` above 0."
            )
        if self.budget == "union" and (self.scope != "model" or self.quantity != "target_logit"):
            raise ValueError(
                'Expected `scope="model"` and `quantity="target_logit"` with `budget="union"`, the paper\'s rule, '
                f"but got scope={self.scope!r} and quantity={self.quantity!r}."
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def searches_alpha(self) -> bool:
        """Whether alpha is to be found rather than given."""
        return isinstance(self.alpha, str)

    @property
    def runs_the_model(self) -> bool:
        """Whether the model has to be run before it can be edited; fusion with a number needs the weights alone."""
        return bool(self.what_runs_the_model)

    @property
    def what_runs_the_model(self) -> list[str]:
        """The arguments for which the model has to be run, as they were given, in backticks.

        >>> Options(reset_fraction=0.02).what_runs_the_model
        ["`alpha='auto'`", '`reset_fraction=0.02`']
        """
        asked = [f"`alpha={self.alpha!r}`"] if self.searches_alpha else []
        asked += [f"`reset_fraction={self.reset_fraction:g}`"] if self.reset_fraction else []
        return [*asked, *(["`refit`"] if self.refit is not None else [])]

    def without_calibration(self, how: str) -> str:
        """Say that calibration data are missing.

        Args:
            how: how they are brought, after "Expected … but got none.".

        >>> print(Options(alpha=0.4, refit=Refit()).without_calibration("Pass a file"))
        Expected calibration data for `refit` but got none. Pass a file, or a number for `alpha` (0.4, say), no
        `reset_fraction` and no `refit`: fusion by a number needs none.
        """
        return (
            f"Expected calibration data for {' and '.join(self.what_runs_the_model)} but got none. {how}, or a number "
            "for `alpha` (0.4, say), no `reset_fraction` and no `refit`: fusion by a number needs none."
        )


def alpha_by_name(alpha: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """Give every parameter its alpha.

    Args:
        alpha: one for all, or one for each name pattern (``*`` and ``?``); the first that fits counts. Patterns may
            leave out what wrappers put into names, such as ``_orig_mod.``.
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
            if fnmatchcase(name, pattern) or fnmatchcase(canonical_name(name), pattern):
                idle.discard(pattern)
                found.setdefault(name, float(value))
    missing = [name for name in names if name not in found]
    if missing or idle:
        raise ValueError(
            "Expected the patterns of `alpha` and the parameters to fit each other but no pattern fits "
            f"{listing(missing)} and no parameter fits {listing(idle)}. End with the pattern '*' to cover the rest."
        )
    return found


def _checked_alpha(alpha: Any) -> Alpha:
    if isinstance(alpha, Mapping):
        shares = {pattern: _number(value) for pattern, value in alpha.items()}
        wrong = {p: alpha[p] for p, share in shares.items() if share is None or not 0.0 <= share <= 1.0}
        if wrong or not shares:
            raise ValueError(
                f"Expected every value of `alpha` to be a number in [0, 1] but got {_shown(wrong or alpha)}."
            )
        if not all(isinstance(pattern, str) for pattern in shares):
            raise ValueError(
                f"Expected the keys of `alpha` to be patterns of parameter names but got {list(shares)}."
            )
        return {str(pattern): share for pattern, share in shares.items() if share is not None}
    if isinstance(alpha, str):
        for rule in get_args(AlphaRule):
            if rule == alpha:
                return rule  # type: ignore[no-any-return]
    number = None if isinstance(alpha, str) else _number(alpha)
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(
            f"Expected argument `alpha` to be a number in [0, 1], a mapping of name patterns to such numbers or "
            f"one of {ALPHA_RULES} but got {_shown(alpha)}."
        )
    return number


def _number(value: Any) -> float | None:
    """Return a real number of any kind as a float; None for what is none, a bool among them, or what no float holds."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):  # 10**400; a signalling NaN
        return None


def _integer(value: Any) -> int | None:
    value = _scalar(value)
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _scalar(value: Any) -> Any:
    """Return the Python number in a scalar of NumPy or PyTorch, without importing the former."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _shown(value: Any) -> str:
    """Return what was got, for a message: of what is very long the beginning."""
    try:
        text = repr(value)
    except ValueError:  # it is, or holds, an integer of more digits than Python writes out
        return f"one of type {type(value).__name__} that is too long to be shown"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
