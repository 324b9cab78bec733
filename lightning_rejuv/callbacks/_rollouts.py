"""What a training step returns of its rollouts: rewards and entropy, as numbers of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def rewards_of(outputs: Mapping[str, Any]) -> Tensor | None:
    """Return the rewards as a tensor of whatever shape; None where there are none.

    Raises:
        TypeError: they are no numbers.

    >>> rewards_of({"rewards": [[0, 1], [1, 1]]}).shape
    torch.Size([2, 2])
    """
    value = outputs.get("rewards")
    return None if value is None else _as_tensor("rewards", value)


def entropy_of(outputs: Mapping[str, Any]) -> float | None:
    """Return the mean token entropy of the rollouts, nats; None where there is none.

    Raises:
        TypeError: it is no real number.
        ValueError: it is several, or none.
    """
    value = outputs.get("entropy")
    if value is None:
        return None
    tensor = _as_tensor("entropy", value)
    if isinstance(value, bool) or tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"Expected argument `entropy` to be a real number but got {value!r}.")
    if tensor.numel() != 1:
        raise ValueError(
            "Expected argument `entropy` to be one number, the mean over the response tokens, but got the shape "
            f"{tuple(tensor.shape)}."
        )
    return float(tensor)


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        return _converted(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        none = isinstance(value, (list, tuple)) or type(value).__module__ == "numpy"
        raise TypeError(
            f"Expected argument `{name}` to be numbers (a tensor, an array of NumPy, lists of one length) but got "
            f"{type(value).__name__}{' that is none of these' if none else ''}."
        ) from error


def _converted(value: Any) -> Tensor:
    """Convert numbers, at once to float64: a Python number never goes through float32."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float64)
    if type(value).__module__ == "numpy":
        return torch.tensor(value.copy())  # torch takes no negative strides
    if not isinstance(value, (list, tuple)):
        raise TypeError
    if all(isinstance(entry, Real) for entry in value):
        return torch.tensor([float(entry) for entry in value], dtype=torch.float64)
    return torch.stack([_converted(entry) for entry in value])
