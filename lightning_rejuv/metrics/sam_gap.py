"""Rise of the loss one ascent step away, averaged over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_positive
from lightning_rejuv.functional.sam_gap import sam_gap
from lightning_rejuv.metrics._mean import MeanMeasure


class SamGap(MeanMeasure):
    r"""Mean over batches of ``L(θ + ρ g / ‖g‖) - L(θ)``; see :func:`lightning_rejuv.functional.sam_gap`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``closure`` (callable): recomputes and returns a batch's scalar loss
    - ``parameters`` (sequence of Tensor): what to move; put back bit for bit

    As output of ``compute`` it returns a float32 scalar, NaN where no batch was given.

    Args:
        rho: length of the step.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: no parameter requires a gradient, or ρ is not positive.

    Example::
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> metric = SamGap(rho=0.5)
        >>> metric.update(lambda: x.square().sum(), [x])
        >>> metric.compute()
        tensor(1.2500)
    """

    higher_is_better: bool | None = False

    def __init__(self, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("rho", rho)
        self.rho = rho

    def update(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        """Add a batch's loss."""
        self.add(sam_gap(closure, parameters, self.rho), torch.tensor(1))
