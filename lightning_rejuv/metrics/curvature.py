"""Curvature of the loss, averaged over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count, check_positive
from lightning_rejuv.functional.curvature import sam_gap, sharpness
from lightning_rejuv.metrics._measure import MeanMeasure


class Sharpness(MeanMeasure):
    r"""Mean over batches of ``λ_max(∇²L)``; see :func:`lightning_rejuv.functional.sharpness`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``closure`` (callable): recomputes and returns a batch's scalar loss
    - ``parameters`` (sequence of Tensor): what to differentiate by

    As output of ``compute`` it returns a float32 scalar, NaN if no batch was given.

    Args:
        iterations: Lanczos steps a batch.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``iterations`` is not positive, no parameter requires a gradient, or the loss is no scalar.

    Example::
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> metric = Sharpness()
        >>> metric.update(lambda: 3 * x[0] ** 2 + x[1] ** 2, [x])
        >>> metric.compute()
        tensor(6.0000)
    """

    higher_is_better: bool | None = False

    def __init__(self, iterations: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("iterations", iterations)
        self.iterations = iterations

    def update(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        """Add a batch's loss."""
        self.add(sharpness(closure, parameters, self.iterations), torch.tensor(1))


class SamGap(MeanMeasure):
    r"""Mean over batches of ``L(θ + ρ g / ‖g‖) - L(θ)``; see :func:`lightning_rejuv.functional.sam_gap`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``closure`` (callable): recomputes and returns a batch's scalar loss
    - ``parameters`` (sequence of Tensor): what to move; they are put back bit for bit

    As output of ``compute`` it returns a float32 scalar, NaN if no batch was given.

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
