"""What all measures share: states of a dtype that no cast of the module around them can take away, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class Measure(Metric):
    """A metric whose states are float64 and int64 sums, and stay so.

    A monitor may be an attribute of a module that is cast: by ``module.to(torch.bfloat16)``, ``half()``, or by a
    Trainer with ``precision="bf16-true"``. A sum of a few hundred tokens in bfloat16 stands still, so that casts,
    :meth:`set_dtype` included, move the states to other devices and leave their dtype alone; what is loaded from
    a checkpoint is brought back to it.
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = None
    full_state_update: bool | None = False

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        def moved(value: Tensor) -> Tensor:
            result = fn(value)
            return result if result.dtype == value.dtype else value.to(result.device)

        return super()._apply(moved, exclude_state)

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, default in self._defaults.items():
            if isinstance(default, Tensor):
                setattr(self, name, getattr(self, name).to(default.dtype))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or a sequence of values over steps; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
