"""Probability that at least one of k samples solves a problem, averaged over problems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.functional.pass_at_k import _pass_at_k_values
from lightning_rejuv.functional.zero_variance_fraction import check_rewards
from lightning_rejuv.metrics._mean import MeanMeasure


class PassAtK(MeanMeasure):
    r"""Unbiased pass@k of rollouts; see :func:`lightning_rejuv.functional.pass_at_k`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``rewards`` (Tensor): ``[prompts, group]``, with ``group >= k`` samples of each prompt

    As output of ``compute`` it returns a float32 scalar, the mean over prompts.

    Args:
        k: how many samples one may use.
        success_threshold: a sample succeeds where its reward is larger than this.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: k < 1, fewer than k samples, or rewards of another shape.
        TypeError: rewards that are no real tensor.

    Example::
        >>> import torch
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
