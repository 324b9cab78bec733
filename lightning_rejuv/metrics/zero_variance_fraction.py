"""Share of prompts that give a group-relative policy gradient nothing to learn from."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.functional.zero_variance_fraction import _zero_variance_fraction_update, check_rewards
from lightning_rejuv.metrics._mean import MeanMeasure


class ZeroVarianceFraction(MeanMeasure):
    r"""Fraction of all-equal groups; see :func:`lightning_rejuv.functional.zero_variance_fraction`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``rewards`` (Tensor): ``[prompts, group]``, with at least two samples of each prompt

    As output of ``compute`` it returns a float32 scalar in [0, 1].

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: rewards of another shape, NaN or inf.
        TypeError: rewards that are no real tensor.

    Example::
        >>> import torch
        >>> metric = ZeroVarianceFraction()
        >>> metric.update(torch.tensor([[0, 1, 0], [1, 1, 1]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def update(self, rewards: Tensor) -> None:
        """Add a batch of prompts with their samples' rewards."""
        check_rewards(rewards)
        self.add(*_zero_variance_fraction_update(rewards))
