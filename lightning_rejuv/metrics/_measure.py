"""What all measures share: states of a dtype that no cast of the module around them can take away, means, and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from typing_extensions import override

from lightning_rejuv._compat import mark_updated

#: Values by measure, and by parameter or site.
LayerValues = dict[str, dict[str, float]]


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

    def add(self, *sums: Tensor) -> None:
        """Add a batch's sums to the states, in the order of the states; on the device, without a host sync."""
        for name, value in zip(self._defaults, sums, strict=True):
            state = getattr(self, name)
            state += value.to(state.device)

    def absorb(self, *sums: Tensor) -> None:
        """Add sums that were taken elsewhere, and count them as one update."""
        mark_updated(self)
        self.add(*sums)

    def warn_empty(self) -> None:
        """Warn that the measure is NaN since no position was measured."""
        rank_zero_warn(f"{type(self).__name__} is NaN: its updates held nothing to measure (only padding?).")

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or a sequence of values over steps; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

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


class MeanMeasure(Measure):
    """A count-weighted mean, so that batches, and processes, of unequal size are weighted rightly.

    Subclasses call :meth:`add` from ``update`` with the sum and the number of values that their function's
    ``_update`` returns.
    """

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the mean over everything since the last reset, float32; NaN, with a warning, if that is nothing."""
        if self.update_called and not bool(self.count):
            self.warn_empty()
        return (self.total / self.count).to(torch.float32)
