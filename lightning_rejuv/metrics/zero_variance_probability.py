"""Expected share of groups without a learning signal, from pass rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.functional.zero_variance_probability import zero_variance_probability
from lightning_rejuv.metrics._mean import MeanMeasure


class ZeroVarianceProbability(MeanMeasure):
    r"""Mean of ``p^g + (1 - p)^g``; see :func:`lightning_rejuv.functional.zero_variance_probability`.

    What RL with groups of g would see, from pass rates that were measured in another way.

    As input to ``forward`` and ``update`` the metric accepts

    - ``p`` (Tensor or float): pass rates in [0, 1], one a prompt

    As output of ``compute`` it returns a float32 scalar in [0, 1], NaN where no rate was given.

    Args:
        group_size: rollouts a prompt, g >= 2.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: p outside [0, 1], or g < 2.

    Example::
        >>> metric = ZeroVarianceProbability(group_size=2)
        >>> metric.update(torch.tensor([0.5, 1.0]))
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, group_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("group_size", group_size, at_least=2)
        self.group_size = group_size

    def update(self, p: float | Tensor) -> None:
        """Add prompts' pass rates."""
        values = zero_variance_probability(p, self.group_size)
        self.add(values.sum(), torch.tensor(values.numel()))
