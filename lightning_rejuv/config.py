"""What a rejuvenation can be asked for: every option, what it means, and what it may be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal, get_args

from lightning_rejuv.names import canonical_name, listing

AlphaRule = Literal["auto"]
Alpha = float | AlphaRule | Mapping[str, float]
PositionRule = Literal["sharpened", "entropy_gap"]
Quantity = Literal["entropy_gradient", "target_logit"]
RankBy = Literal["absolute", "signed", "random"]
Scope = Literal["model", "layer", "module"]
Budget = Literal["share", "union"]
OptimizerState = Literal["keep", "momentum", "reset"]
Rounding = Literal["nearest", "stochastic"]
Dtype = Literal["float32", "bfloat16", "float16"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
PathLike = str | os.PathLike[str]

#: RL did best from about this alpha, or as well as from any, on every line of docs/alpha.md. The paper's is 0.5.
USUAL_ALPHA = 0.4
# What calibration data are for, and what needs none, in messages.
USES_OF_CALIBRATION = '`alpha="auto"`, a `reset` or a `refit`'
WITHOUT_CALIBRATION = "a number for `alpha`, no `reset` and no `refit`"
_ANY = float("inf")
_SEEDS = (-(2**63), 2**64 - 1)  # what PyTorch takes as a seed
_LONGEST = 200  # characters of a value in a message
# Learning rates of a refit that names none: of a whole model, and of adapters alone, whose B starts at zero.
LEARNING_RATE, LEARNING_RATE_OF_ADAPTERS = 2e-5, 2e-4


@dataclass(frozen=True)
class Reset:
    """The attribution-targeted reset of neurons to the base (Liu et al. 2026, arXiv 2606.09932, §3).

    A reset neuron becomes ``omega * base + (1 - omega) * fused``. The neurons are those that push hardest on
    over-confident tokens, measured on calibration data.

    Attributes:
        fraction: share of all neurons that is reset, above 0 and at most 1, in all scopes together and rounded once.
            Fewer are reset if fewer have a positive score, and the report says so.
        omega: weight of the base on a reset neuron, 0 to 1; 1 overwrites it.
        positions: at which positions of responses neurons are attributed: ``"sharpened"``, where the base already
            gave the target p >= 0.25, so that new skills are not un-taught; or ``"entropy_gap"``, the paper's rule.
        positions_per_response: at how many positions of a response, at most.
        quantity: what is attributed to neurons: ``"entropy_gradient"``, how much a reset raises the entropy of the
            fused model to first order; or ``"target_logit"``, the paper's: a neuron's contribution to the target's
            logit.
        rank_by: ``"signed"`` or ``"absolute"`` mean contribution; None for signed with the entropy gradient and
            absolute otherwise. With the entropy gradient the absolute values are those of each batch, so that they
            depend on how the data are batched, but not on the parts that a batch goes through the model in.
            ``"random"`` is the control: as many neurons of each matrix as the quantity's own ranking takes, drawn at
            random.
        scope: what neurons compete in: the ``"model"``, each ``"layer"`` or each ``"module"``.
        budget: ``"share"``, ``fraction`` of the neurons; or ``"union"``, the paper's: the union over positions of
            the top ``fraction`` at each, which needs ``quantity="target_logit"`` and ``scope="model"``.

    Raises:
        ValueError: one is out of range, with its name, what was expected and what was got.

    >>> Reset(omega=1.5)
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `omega` of `Reset` to be a number in [0, 1] but got 1.5.
    """

    fraction: float = 0.02
    omega: float = 1.0
    positions: PositionRule = "sharpened"
    positions_per_response: int = 1
    quantity: Quantity = "entropy_gradient"
    rank_by: RankBy | None = None
    scope: Scope = "model"
    budget: Budget = "share"

    def __post_init__(self) -> None:
        _set_number(self, "fraction", lambda share: 0.0 < share <= 1.0, "a number above 0 and at most 1")
        _set_number(self, "omega", lambda share: 0.0 <= share <= 1.0, "a number in [0, 1]")
        _set_integer(self, "positions_per_response", 1)
        _set_choice(self, "positions", get_args(PositionRule))
        _set_choice(self, "quantity", get_args(Quantity))
        _set_choice(self, "rank_by", (*get_args(RankBy), None))
        _set_choice(self, "scope", get_args(Scope))
        _set_choice(self, "budget", get_args(Budget))
        if self.budget == "union" and (self.scope != "model" or self.quantity != "target_logit"):
            raise ValueError(
                'Expected `scope="model"` and `quantity="target_logit"` of `Reset` with `budget="union"`, the paper\'s '
                f"rule, but got scope={self.scope!r} and quantity={self.quantity!r}."
            )


@dataclass(frozen=True)
class Refit:
    """A few plain training steps after the edit, on calibration responses and the base's own samples together.

    AdamW (betas 0.9 and 0.999, no weight decay, a constant learning rate) on the negative log-likelihood of response
    tokens, in nats a response; see :mod:`lightning_rejuv.refit`. Every parameter that requires a gradient is trained.

    Attributes:
        steps: how many updates are made.
        learning_rate: AdamW's; None for 2e-5, or 2e-4 for a model with adapters (PEFT). The small models of the demo,
            of some 100 thousand weights, were refitted with 5e-4.
        batch_size: how many responses an update is made from; all of them if there are fewer. It takes no memory:
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
        _set_integer(self, "steps", 1)
        _set_integer(self, "batch_size", 1)
        if self.learning_rate is not None:
            _set_number(self, "learning_rate", lambda rate: 0.0 < rate < _ANY, "a finite number above 0")


@dataclass(frozen=True)
class Options:
    """Checked options of a rejuvenation, wherever it is asked for: in memory, in a fit or on disk.

    Attributes:
        alpha: weight of the SFT model in the fusion: ``"auto"``, or a number, 0 to 1, or one for each name pattern.
        reset: which neurons are reset, and how; None for fusion alone.
        refit: the training steps after the edit; None for none.
        optimizer_state: what optimizers forget of edited weights.
        rounding: how weights of half types are rounded.
        seed: of the random control, sampling, stochastic rounding and the order of a refit.

    Raises:
        ValueError: one is out of range, with its name, what was expected and what was got.

    >>> Options(alpha=1.5)
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `alpha` to be a number in [0, 1], a mapping of name patterns ... but got 1.5.
    """

    alpha: Alpha = "auto"
    reset: Reset | None = None
    refit: Refit | None = None
    optimizer_state: OptimizerState = "momentum"
    rounding: Rounding = "stochastic"
    seed: int = 0

    def __post_init__(self) -> None:
        # From here on every value is a plain number or string, so that nothing that follows can fail over its type.
        object.__setattr__(self, "alpha", _checked_alpha(self.alpha))
        _set_choice(self, "optimizer_state", get_args(OptimizerState))
        _set_choice(self, "rounding", get_args(Rounding))
        _set_integer(self, "seed", *_SEEDS)
        for name, kind, example in (("reset", Reset, "fraction=0.02"), ("refit", Refit, "steps=20")):
            if not ((got := getattr(self, name)) is None or isinstance(got, kind)):
                raise ValueError(
                    f"Expected argument `{name}` to be a `{kind.__name__}` or None but got {_shown(got)}. Pass "
                    f"`{kind.__name__}({example})`, say."
                )

    @property
    def searches_alpha(self) -> bool:
        """Whether alpha is to be found rather than given."""
        return isinstance(self.alpha, str)

    @property
    def samples_the_base(self) -> bool:
        """Whether responses of the base are needed: for the search for alpha, and for a refit."""
        return self.searches_alpha or self.refit is not None

    @property
    def runs_the_model(self) -> bool:
        """Whether the model has to be run before it can be edited; fusion with a number needs the weights alone."""
        return bool(self.what_runs_the_model)

    @property
    def what_runs_the_model(self) -> list[str]:
        """The arguments for which the model has to be run, in backticks.

        >>> Options(reset=Reset()).what_runs_the_model
        ["`alpha='auto'`", '`reset`']
        """
        asked = [f"`alpha={self.alpha!r}`"] if self.searches_alpha else []
        return asked + [f"`{name}`" for name in ("reset", "refit") if getattr(self, name) is not None]

    def without_calibration(self, how: str) -> str:
        """Say that calibration data are missing.

        Args:
            how: how they are brought, after "Expected … but got none.".

        >>> print(Options(alpha=0.4, refit=Refit()).without_calibration("Pass a file"))
        Expected calibration data for `refit` but got none. Pass a file, or a number for `alpha`, no `reset` and no
        `refit`: fusion by a number needs none.
        """
        return (
            f"Expected calibration data for {' and '.join(self.what_runs_the_model)} but got none. {how}, or "
            f"{WITHOUT_CALIBRATION}: fusion by a number needs none."
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
            f"one of {get_args(AlphaRule)} but got {_shown(alpha)}."
        )
    return number


def _set_number(options: Any, name: str, fits: Callable[[float], bool], expected: str) -> None:
    """Replace a field by the float that it stands for; refuse another."""
    number = _number(got := getattr(options, name))
    if number is None or not fits(number):
        raise ValueError(f"Expected {_called(options, name)} to be {expected} but got {_shown(got)}.")
    object.__setattr__(options, name, number)


def _set_integer(options: Any, name: str, low: int, high: float = _ANY) -> None:
    number = _integer(got := getattr(options, name))
    if number is None or not low <= number <= high:
        most = "" if high is _ANY else f" and at most {high}"
        raise ValueError(
            f"Expected {_called(options, name)} to be an integer of at least {low}{most} but got {_shown(got)}."
        )
    object.__setattr__(options, name, number)


def _set_choice(options: Any, name: str, allowed: tuple[str | None, ...]) -> None:
    got = getattr(options, name)
    fitting = [choice for choice in allowed if got is choice or (isinstance(got, str) and got == choice)]
    if not fitting:
        raise ValueError(f"Expected {_called(options, name)} to be one of {allowed} but got {_shown(got)}.")
    object.__setattr__(options, name, fitting[0])


def _called(options: Any, name: str) -> str:
    """Return what a message calls an option: an argument, or one of the object that it belongs to."""
    return f"argument `{name}`" + ("" if isinstance(options, Options) else f" of `{type(options).__name__}`")


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
