"""Checks of arguments that the measures share; messages name the argument, what was expected and what was got."""

from __future__ import annotations

import torch
from torch import Tensor


def check_floating(name: str, value: Tensor, ndim: int | None = None) -> None:
    """Raise unless ``value`` is a real floating-point tensor, of rank ``ndim`` if that is given.

    Raises:
        TypeError: ``value`` is no tensor, or not of a real floating dtype.
        ValueError: it has another rank.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected argument `{name}` to be a tensor but got {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"Expected argument `{name}` to be of a floating dtype but got {value.dtype}.")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(
            f"Expected argument `{name}` to have {ndim} dimensions but got shape {tuple(value.shape)}."
        )


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless the two tensors have one shape."""
    if value.shape != other.shape:
        raise ValueError(
            f"Expected arguments `{name}` and `{other_name}` to have the same shape "
            f"but got {tuple(value.shape)} and {tuple(other.shape)}."
        )


def check_mask(mask: Tensor | None, shape: torch.Size, of: str) -> None:
    """Raise unless ``mask`` is None or a bool (or integer) tensor of ``shape``.

    Raises:
        TypeError: the mask is floating; it may well be an additive one.
        ValueError: it has another shape than ``of`` has without its last dimension.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"Expected argument `mask` to be a bool or integer tensor but got {got}.")
    if mask.shape != shape:
        raise ValueError(
            f"Expected argument `mask` to have the shape {tuple(shape)} (`{of}` without its last dimension) "
            f"but got {tuple(mask.shape)}."
        )


def check_selects(mask: Tensor | None, count: int) -> None:
    """Raise ValueError if a mask leaves no position to measure."""
    if count == 0:
        what = "no position at all" if mask is None else "a mask that selects none"
        raise ValueError(f"Expected at least one position to measure but got {what} (only padding?).")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a positive, finite number."""
    if not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
        raise ValueError(f"Expected argument `{name}` to be a positive float but got {value!r}.")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least 0."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
        raise ValueError(f"Expected argument `{name}` to be a float >= 0 but got {value!r}.")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= ``value`` <= 1."""
    if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"Expected argument `{name}` to be a float in [0, 1] but got {value!r}.")


def check_count(name: str, value: int, at_least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``at_least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"Expected argument `{name}` to be an integer >= {at_least} but got {value!r}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"Expected argument `{name}` to be one of {choices} but got {value!r}.")


def check_logits(name: str, statistic: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError if a per-position statistic of the logits is NaN (one host sync).

    It is NaN exactly if a row of logits holds NaN, +inf or nothing but -inf. A single -inf is a
    masked-out token and legitimate: it has probability zero.
    """
    bad = torch.isnan(statistic)
    count = int((bad if mask is None else bad & mask.to(torch.bool)).sum())
    if count:
        raise ValueError(
            f"Expected argument `{name}` to hold finite logits (-inf only for masked-out tokens) but got "
            f"NaN, +inf or nothing but -inf at {count} positions. Has the model diverged, or do its logits overflow? "
            "Run it in float32 or bfloat16."
        )
