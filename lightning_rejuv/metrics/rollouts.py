"""Measures of rollouts, averaged over prompts: what repeated samples solve, and which groups carry a signal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.functional.rollouts import (
    _pass_at_k_values,
    _zero_variance_fraction_update,
    check_rewards,
)
from lightning_rejuv.metrics._measure import MeanMeasure


class PassAtK(MeanMeasure):
    r"""Unbiased pass@k of rollouts; see :func:`lightning_rejuv.functional.pass_at_k`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``rewards`` (Tensor): ``[prompts, group]``, with ``group >= k`` samples of each prompt

    As output of ``compute`` it returns a float32 scalar, the mean over prompts.

    Args:
        k: how many samples one may use.
        success_threshold: a sample succeeds if its reward is larger than this.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: k < 1, there are fewer than k samples, or rewards have another shape.
        TypeError: rewards are no real tensor.

    Example::
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, k: int = 1, success_threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("k", k)
        self.k = k
        self.success_threshold = success_threshold

    def update(self, rewards: Tensor) -> None:
        """Add a batch of prompts with their samples' rewards."""
        check_rewards(rewards)
        prompts, group = rewards.shape
        if group < self.k:
            raise ValueError(
                f"Expected argument `rewards` to have at least k = {self.k} samples a prompt but got {group}."
            )
        # Beside integers PyTorch would round the threshold to its default dtype.
        values = rewards if rewards.is_floating_point() else rewards.double()
        solved = (values > self.success_threshold).sum(dim=1)
        found = _pass_at_k_values(torch.full_like(solved, group), solved, self.k)
        self.add(found.sum(), torch.tensor(prompts))


class ZeroVarianceFraction(MeanMeasure):
    r"""Fraction of all-equal groups; see :func:`lightning_rejuv.functional.zero_variance_fraction`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``rewards`` (Tensor): ``[prompts, group]``, with at least two samples of each prompt

    As output of ``compute`` it returns a float32 scalar in [0, 1].

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: rewards have another shape, or hold NaN or inf.
        TypeError: rewards are no real tensor.

    Example::
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
